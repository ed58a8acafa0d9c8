"""What a build knows, as text and HTML; it decides nothing.

In: the frozen types of :mod:`edgepack.results`. Out: lines of text (``text``) and one offline HTML file
(``html/``, charts included). ``comparison`` puts two builds side by side.
"""
