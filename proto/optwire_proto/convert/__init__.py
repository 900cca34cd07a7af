"""Plain data to protobuf messages and back: total one way, strict the other.

The only shared part that knows generated code. What a message names and this version does not serve is refused here
with UnsupportedError, never ignored.
"""

from optwire_proto.convert.errors import cut, error_from_proto, error_to_proto
from optwire_proto.convert.pushes import (
    ack_from_proto,
    ack_to_proto,
    chunk_into,
    digest_from_proto,
    digest_to_proto,
    end_from_proto,
    push_from_proto,
    push_to_proto,
)
from optwire_proto.convert.served import refuse_unknown_fields, served
from optwire_proto.convert.sessions import (
    aggregation_from_proto,
    aggregation_to_proto,
    check_begin,
    check_read,
    extension_from_proto,
    extension_to_proto,
    hyperparams_from_proto,
    load_from_proto,
    load_to_proto,
    optimizer_from_proto,
    optimizer_to_proto,
    ref_from_proto,
    ref_to_proto,
    server_from_proto,
    server_to_proto,
    session_from_proto,
    session_to_proto,
    terms_from_proto,
    terms_into,
)
from optwire_proto.convert.specs import (
    entry_from_proto,
    entry_to_proto,
    spec_from_proto,
    spec_to_proto,
    value_from_proto,
    value_to_proto,
)
from optwire_proto.convert.trees import tree_from_proto, tree_to_proto

__all__ = [
    "ack_from_proto",
    "ack_to_proto",
    "aggregation_from_proto",
    "aggregation_to_proto",
    "check_begin",
    "check_read",
    "chunk_into",
    "cut",
    "digest_from_proto",
    "digest_to_proto",
    "end_from_proto",
    "entry_from_proto",
    "entry_to_proto",
    "error_from_proto",
    "error_to_proto",
    "extension_from_proto",
    "extension_to_proto",
    "hyperparams_from_proto",
    "load_from_proto",
    "load_to_proto",
    "optimizer_from_proto",
    "optimizer_to_proto",
    "push_from_proto",
    "push_to_proto",
    "ref_from_proto",
    "ref_to_proto",
    "refuse_unknown_fields",
    "served",
    "server_from_proto",
    "server_to_proto",
    "session_from_proto",
    "session_to_proto",
    "spec_from_proto",
    "spec_to_proto",
    "terms_from_proto",
    "terms_into",
    "tree_from_proto",
    "tree_to_proto",
    "value_from_proto",
    "value_to_proto",
]
