"""The jail of ``creto run``: namespaces in which the sidecar is an agent's only way out.

``launch(JailSpec(...), redirect)`` gives a ``Jail`` whose ``listeners`` the sidecar serves.
"""

from creto_proxy.jail.launch import PORTS, JailSpec, launch
from creto_proxy.jail.network import Listeners, original_destination
from creto_proxy.jail.process import Jail

__all__ = ["PORTS", "Jail", "JailSpec", "Listeners", "launch", "original_destination"]
