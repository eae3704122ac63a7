"""N data processes behind one controller: who starts whom, what they say to each other, and how they are replaced.

    creto sidecar        the controller: configuration, listening sockets, CA, journal consumers, timers, admin
      creto_proxy.workers  one worker per slot: accepts, judges, relays, and appends to a journal of its own

A worker may die at any moment: its sockets belong to the controller, so what waits in their queues is served by its
successor, and what it acknowledged is in its journal. A controller may die too: its workers drain and end, and the
next start adopts their journals.
"""
