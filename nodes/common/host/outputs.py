"""What a node hands out where it has nothing to hand out."""


def nothing() -> object:
    """An output behind which no node runs: the rest of the graph goes on."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(None)
