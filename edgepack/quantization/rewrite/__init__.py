"""The room rewrite."""
