"""An error is the same on both sides of a process boundary."""

import grpc
import pytest

from kiln_common.errors import ErrorKind, RemoteError, Unavailable
from kiln_common.pb import common_pb2
from kiln_common.rpc import from_error_detail, from_rpc_error, to_error_detail


class FailedCall(grpc.RpcError):
    """What a gRPC call raises, with the parts that clients read."""

    def __init__(self, status, metadata=(), details="some details"):
        self._status, self._metadata, self._details = status, metadata, details

    def code(self):
        return self._status

    def trailing_metadata(self):
        return self._metadata

    def details(self):
        return self._details


def make_error(kind):
    return RemoteError("some_code", kind, "7 of 5", hint="send 5", param="n", retry_after_s=2.5)


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_survives_the_wire_form(kind):
    detail = common_pb2.ErrorDetail.FromString(to_error_detail(make_error(kind)).SerializeToString())
    again = from_error_detail(detail)
    assert vars(again) == vars(make_error(kind))
    assert hasattr(grpc.StatusCode, detail.status)


def test_kinds_have_statuses_of_their_own():
    assert len({kind.grpc_status for kind in ErrorKind}) == len(ErrorKind)


def test_a_failed_call_raises_the_error_in_its_metadata():
    detail = to_error_detail(make_error(ErrorKind.CONFLICT)).SerializeToString()
    call = FailedCall(grpc.StatusCode.ABORTED, (("kiln-error-bin", detail),))
    assert vars(from_rpc_error(call, "engine", Unavailable)) == vars(make_error(ErrorKind.CONFLICT))


def test_a_failed_call_without_our_metadata_means_the_service_is_away():
    error = from_rpc_error(FailedCall(grpc.StatusCode.UNAVAILABLE), "engine", Unavailable)
    assert isinstance(error, Unavailable)
    assert "engine did not answer (unavailable: some details)" in error.message


@pytest.mark.parametrize("address", ["unix:/srv/kiln/run/trainer.sock:", "ipv4:127.0.0.1:8432:"])
def test_a_service_that_is_away_is_not_told_by_its_address(address):
    details = f"failed to connect to all addresses; last error: UNKNOWN: {address} connect: Refused (111)"
    error = from_rpc_error(FailedCall(grpc.StatusCode.UNAVAILABLE, (), details), "trainer", Unavailable)
    assert "last error: UNKNOWN: connect: Refused (111)" in error.message
    assert "trainer.sock" not in error.message
    assert "8432" not in error.message
