# Empty on purpose: importing one module of the protocol must not load the others, protobuf among them.
