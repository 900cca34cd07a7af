"""Every number of the protocol that both ends must agree on, with its unit and its reason."""

KIB = 1024
MIB = 1024 * KIB

# A default-configured gRPC client in any language receives messages of up to 4 MiB; chunks stay well below.
CHUNK_BYTES_MAX = 2 * MIB
# What our own ends send. 256 KiB costs a third more CPU a byte; above 1 MiB nothing is gained and a copy leaves the
# cache.
CHUNK_BYTES = 1 * MIB
# gRPC's own default, said aloud: what is longer is refused by gRPC itself with RESOURCE_EXHAUSTED.
MESSAGE_BYTES_MAX = 4 * MIB
# Arrays that start on this boundary are adopted by JAX without a copy, and copied fastest.
ALIGNMENT_BYTES = 64
# A stage notes which bytes have come: beside one piece for each leaf, as many more with gaps around them. Without a
# limit a message of a byte would cost more to be noted than to be sent.
STAGE_GAPS_MAX = 1024
# A unary Step carries its payload in one message.
UNARY_PAYLOAD_BYTES_MAX = 2 * MIB

# A tree spec must fit one message, whatever the number of leaves; a server may compile fewer (GetServerInfo says).
LEAVES_MAX = 65_536
NODES_MAX = 2 * LEAVES_MAX
DEPTH_MAX = 64
RANK_MAX = 8
# A dimension beyond this is a mistake or an attack, even beside a zero.
DIM_MAX = 2**40
# Far beyond any machine, and far from where 64-bit arithmetic of the libraries below would overflow.
PAYLOAD_BYTES_MAX = 2**56
NAME_BYTES_MAX = 1024
TYPE_NAME_BYTES_MAX = 255

# The index of an update is a number of 32 bits where it is computed with.
STEP_MAX = 2**31 - 1

# A token tells payloads in shared memory apart: as improbable to be drawn twice as an id.
TOKEN_BYTES = 16
# What asks for shared memory names a session and a worker; what answers, an offset for each leaf, in decimal digits.
HANDOVER_REQUEST_BYTES_MAX = 4 * KIB
HANDOVER_REPLY_BYTES_MAX = 4 * MIB

SESSION_NAME_CHARS_MAX = 128
# Turns that a session may have on the device for each one of another: blocks of a millisecond.
TURNS_MAX = 64
# Whose last pushes a session remembers, and so the most whose mean makes one step.
WORKERS_MAX = 1024
# Of those that a step waits for, so many are named to a worker that is heard of.
AWAITED_MAX = 64
# Seconds that a worker's lease may last, unless it lasts for ever, and a step may wait for more pushes.
LEASE_S_MIN = 0.1
LEASE_S_MAX = 86_400.0
SPEC_NAME_BYTES_MAX = 128
SPEC_TEXT_BYTES_MAX = 4 * KIB
# Numbers of a spec are computed with in 32 bits or fewer, unless the parameters have 64; larger ones would be infinite.
SPEC_NUMBER_MAX = 3.4028234663852886e38
# Smaller ones are 0 where the update divides by them.
GRAD_SCALE_MIN = 1.1754943508222875e-38
# What a push counts among others: products with gradients, and sums of a thousand, stay far from where 32 bits end.
WEIGHT_MIN = 1e-12
WEIGHT_MAX = 1e12
SPEC_DEPTH_MAX = 16
# On the wire a chain counts twice, as a spec and as a list; a guard against bombs, the rule is the one above.
SPEC_WIRE_DEPTH_MAX = 40
SPEC_LIST_MAX = 4096
# Repetitions that are unrolled in the compiled update.
SPEC_FEW_MAX = 64
# Values of one spec, all lists together: what is larger is a table and belongs into an array.
SPEC_VALUES_MAX = 16_384
SPEC_ARRAY_BYTES_MAX = 64 * KIB
# An exported Adam takes 5 kB.
SPEC_BLOB_BYTES_MAX = 256 * KIB
# Room for a blob as base64.
SPEC_TEXT_FORM_BYTES_MAX = 512 * KIB
PATTERN_CHARS_MAX = 256
# Characters of patterns times characters of names, of one spec: seconds at worst, and 60 groups of 2,000 leaves.
PATTERN_WORK_MAX = 100_000_000
# Changes of hyperparameters kept with a session; older ones are folded into its spec.
HYPERPARAM_CHANGES_MAX = 1024
# Names of one change: eight for each of 2,048 groups.
HYPERPARAM_NAMES_MAX = 16_384
# Steps to come at which hyperparameters change: each holds a compiled program, and is gone over at every change.
HYPERPARAM_STEPS_MAX = 256
# And told of, where each is long.
CHANGES_BYTES_MAX = 512 * KIB

# Trailing metadata is limited to 8 KiB by common servers and proxies, and a status message grows threefold on the way
# where it is not ASCII.
ERROR_MESSAGE_BYTES_MAX = 1024
ERROR_DETAIL_BYTES_MAX = 512
