"""The example photographs as a node, so that the shipped workflows run as they are."""
