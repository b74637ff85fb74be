"""The only writer: edits of the graph, and files that are replaced all or nothing."""
