"""Update rules, one per file, each with a twin beside it and in csrc/rules. csrc/rules/all.h repeats this list."""

from epi_kernels.rules.adamw import ADAMW
from epi_kernels.rules.lion import LION
from epi_kernels.rules.rule import Rule, Slot

__all__ = ["ADAMW", "LION", "RULES", "Rule", "Slot", "rule_of"]

# a rule's position is its number in compiled code
RULES: list[Rule] = [ADAMW, LION]


def rule_of(name: str) -> Rule:
    """Return the rule with the given name.

    Raises:
        ValueError: there is no such rule.
    """
    for rule in RULES:
        if rule.name == name:
            return rule
    raise ValueError(f"Invalid rule: {name!r}; choose one of {[rule.name for rule in RULES]}")
