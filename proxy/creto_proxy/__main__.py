"""``python -m creto_proxy`` is ``creto``."""

from creto_proxy.cli import main

main()
