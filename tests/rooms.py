"""The rooms at the top of `vlmprune/`, in the order of imports."""

ROOMS = [  # from the ground up: a room imports from those before it only
    "errors",
    "device",
    "show",
    "schedule",
    "view",
    "cost",
    "kernels",
    "adapters",
    "methods",
    "names",
    "recipe",
    "live",
    "",  # the public names
    "tiny",
    "loading",
    "evals",
    "cli",
    "__main__",
]
