"""The model that is read: its files, its index, constants and shapes."""
