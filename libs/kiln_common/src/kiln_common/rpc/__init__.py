"""gRPC plumbing: servers that translate errors and report health, channels with our limits."""

from kiln_common.rpc.channel import open_channel
from kiln_common.rpc.errors import (
    ErrorInterceptor,
    details_of,
    from_error_detail,
    from_rpc_error,
    to_error_detail,
)
from kiln_common.rpc.server import RpcServer

__all__ = [
    "ErrorInterceptor",
    "RpcServer",
    "details_of",
    "from_error_detail",
    "from_rpc_error",
    "open_channel",
    "to_error_detail",
]
