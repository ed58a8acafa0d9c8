"""The room operators."""
