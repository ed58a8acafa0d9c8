"""The stages from an ONNX file and samples to a measured package, and one module for each other command.

In: a recipe, a target and samples. Out: the files of a package and a :class:`~edgepack.results.BuildReport`.
``build`` holds the order of the stages; ``passes`` runs the compression passes of a recipe; ``weights``
rounds the stored weights; ``limits`` turns the gate of a recipe into limits for the selection.
"""
