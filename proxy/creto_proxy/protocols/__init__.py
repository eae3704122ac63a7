"""What agents say inside HTTP: MCP, A2A and calls of models, as actions and attributes that policy can name.

``detect`` tells what a request declares, ``mcp``, ``a2a`` and ``llm`` what its messages ask for, ``inspection`` joins
them and looks no further than policy does. See docs/protocols.md for what policies can say.
"""

from creto_proxy.protocols.call import Call, resource_of
from creto_proxy.protocols.detect import DETECTION_HEADERS, Declared, declared
from creto_proxy.protocols.inspection import Inspector
from creto_proxy.protocols.llm import Providers

__all__ = ["DETECTION_HEADERS", "Call", "Declared", "Inspector", "Providers", "declared", "resource_of"]
