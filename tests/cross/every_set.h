// For dispatch.cpp alone: what the driver emulates counts as there.

#define __builtin_cpu_supports(name) 1
