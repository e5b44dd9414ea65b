// The list of rules, the same list as in epi_kernels/rules/__init__.py. A rule is RULE(its name in schema.h, its
// struct).
#pragma once

#include "adamw.h"
#include "lion.h"

#define EPI_FOR_EACH_RULE(RULE) RULE(EPI_RULE_ADAMW, AdamW) RULE(EPI_RULE_LION, Lion)
