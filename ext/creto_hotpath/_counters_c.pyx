# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=False, binding=False
"""Counters that other processes can read. Compiled form of ``_counters_py``."""

from libc.stdint cimport int64_t

from creto_hotpath import _counters_file as layout

cdef int64_t HISTOGRAM = layout.HISTOGRAM_CELLS


cdef class Counters:
    """Numbers of one process in a file, by cell. See ``_counters_py.Counters``."""

    def __init__(self, path, cells=layout.CELLS, directory_bytes=layout.DIRECTORY_BYTES):
        cdef unsigned char[::1] view
        if self.cells is not NULL:
            raise RuntimeError("these counters are in use already")
        self.file = layout.CountersFile(path, cells, directory_bytes)
        view = self.file.map
        self.view = view
        self.cells = <int64_t *>(&view[0] + <Py_ssize_t>layout.HEADER_BYTES)
        self.used = 0

    def allocate(self, name, cells=1):
        """The first of ``cells`` cells, at zero, under ``name``."""
        first = self.file.allocate(name, cells)
        self.used = self.file.used
        return first

    def histogram(self, name):
        """The cell to ``observe`` on of a new histogram."""
        return self.allocate(name, layout.HISTOGRAM_CELLS)

    cdef int check(self, int64_t cell) except -1:
        if cell < 0 or cell >= self.used:
            raise IndexError(f"cell {cell} was not given out")
        return 0

    def add(self, int64_t cell, int64_t amount=1):
        """Raises IndexError for a cell that was not given out. Wraps at 64 bits."""
        self.check(cell)
        counters_add(self, cell, amount)

    def set(self, int64_t cell, int64_t value):
        """Raises IndexError for a cell that was not given out."""
        self.check(cell)
        counters_set(self, cell, value)

    def get(self, int64_t cell):
        """Raises IndexError for a cell that was not given out."""
        self.check(cell)
        return self.cells[cell]

    def observe(self, int64_t cell, int64_t value_ns):
        """Counts one value in the histogram that begins at ``cell``; one below zero counts as zero."""
        self.check(cell)
        self.check(cell + HISTOGRAM - 1)
        counters_observe(self, cell, value_ns)

    def close(self):
        """Lets readers see that nobody writes any more."""
        self.file.close()
