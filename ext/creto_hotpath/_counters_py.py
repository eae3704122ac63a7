"""Counters that other processes can read: plain stores into a mapped file. The specification of ``_counters_c``."""

from __future__ import annotations

from creto_hotpath._counters_file import CELLS, DIRECTORY_BYTES, HEADER_BYTES, HISTOGRAM_CELLS, CountersFile, bucket_of

_LOW, _HIGH = -(2**63), 2**63 - 1


class Counters:
    """Numbers of one process in a file, by cell. Only this process writes them; ``read_counters`` reads them.

    ``allocate`` gives out cells under a name; ``add``, ``set`` and ``observe`` take the cell and cost a store or two.
    """

    def __init__(self, path: str, cells: int = CELLS, directory_bytes: int = DIRECTORY_BYTES) -> None:
        """Makes the file anew. Raises BlockingIOError when another process writes it, OSError when it cannot be."""
        self._file = CountersFile(path, cells, directory_bytes)
        self._cells = memoryview(self._file.map)[HEADER_BYTES : HEADER_BYTES + cells * 8].cast("q")
        self._used = 0

    @property
    def used(self) -> int:
        """Cells given out."""
        return self._used

    def allocate(self, name: str, cells: int = 1) -> int:
        """The first of ``cells`` cells, at zero, under ``name``. Raises CountersFull; ValueError for a tab or newline
        in the name."""
        first = self._file.allocate(name, cells)
        self._used = self._file.used
        return first

    def histogram(self, name: str) -> int:
        """The cell to ``observe`` on of a new histogram. Raises as ``allocate`` does."""
        return self.allocate(name, HISTOGRAM_CELLS)

    def add(self, cell: int, amount: int = 1) -> None:
        """Raises IndexError for a cell that was not given out. Wraps at 64 bits."""
        at = self._checked(cell)
        self._cells[at] = _wrapped(self._cells[at] + _word(amount))

    def set(self, cell: int, value: int) -> None:
        """Raises IndexError for a cell that was not given out."""
        self._cells[self._checked(cell)] = _word(value)

    def get(self, cell: int) -> int:
        """Raises IndexError for a cell that was not given out."""
        return self._cells[self._checked(cell)]

    def observe(self, cell: int, value_ns: int) -> None:
        """Counts one value in the histogram that begins at ``cell``; one below zero counts as zero.

        Raises IndexError when no histogram can begin there.
        """
        self._checked(cell)
        self._checked(cell + HISTOGRAM_CELLS - 1)
        value = max(0, _word(value_ns))
        self._cells[cell] = _wrapped(self._cells[cell] + value)
        at = cell + 1 + bucket_of(value)
        self._cells[at] += 1

    def close(self) -> None:
        """Lets readers see that nobody writes any more. What is counted afterwards is counted in vain."""
        self._file.close()

    def _checked(self, cell: int) -> int:
        if not 0 <= cell < self._used:
            raise IndexError(f"cell {cell} was not given out")
        return cell


def _word(value: int) -> int:
    if not _LOW <= value <= _HIGH:
        raise OverflowError(f"{value} does not fit into 64 bits")
    return value


def _wrapped(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
