"""The report of a build as text and HTML; nothing is measured or decided here.

In: the frozen types of :mod:`edgepack.results`. Out: lines of text (``text``) and one offline HTML file
(``html/``, charts included). ``comparison`` compares two builds.
"""
