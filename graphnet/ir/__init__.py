"""The IR: types, ops, graphs, their text, the verifier and analyses."""
