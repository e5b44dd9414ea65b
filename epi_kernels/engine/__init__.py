"""The step of an optimizer: torch's contract, the plan of a step, the state. It knows no EPI: it is handed a method."""
