"""``python -m creto_proxy.workers``: how a controller starts a worker."""

import sys

from creto_proxy.workers.worker import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
