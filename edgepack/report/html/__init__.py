"""The HTML report: one file that opens offline; ``charts`` draws SVG, ``sections`` order the page."""
