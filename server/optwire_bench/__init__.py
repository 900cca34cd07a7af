"""The benchmark, `optwire bench`: what a remote step costs beside a local one, measured in one run.

Uses the client as its users do, and the server by its command. Nothing of either imports this package, except that the
command ``optwire`` hands `bench` over to it.

    command     the command line
    models      the trees that are stepped, and their gradients
    roles       what the measured processes do, each on its own
    processes   starting them, asking them, and what they cost
    limits      the machine's own limits: memcpy, raw TCP
    naive       the peer that needs nothing installed: gRPC with generated messages
    cases       what there is to measure, by name
    stepping    `bench step`: rounds in which all take turns
    transfers   `bench limits`: one way and both ways at once, beside raw TCP
    fairness    `bench fairness`: a tiny session beside a large one
    cold        `bench cold`: the first step of a server
    reports     JSON, table, plot
"""
