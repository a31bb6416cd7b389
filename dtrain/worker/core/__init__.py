"""The agent's pure state machine: `machine.step(state, input, now) -> (state, actions)`. No I/O, no clock."""
