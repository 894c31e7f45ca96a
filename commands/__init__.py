"""The commands of `fourfold`: each module has `add_parser(subparsers)`, which sets `run(arguments) -> exit code`."""
