"""The cluster side: manifests, and the commands that put them on a kind cluster and check it."""
