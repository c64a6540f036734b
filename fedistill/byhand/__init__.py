"""Small convolutional networks by hand: forward and backward as a few products of matrices.

PyTorch's own layers spend much of a step of a small image model on pooling, on changes of layout,
on channels that fill a vector register only in part, and on a graph of dozens of nodes. Here
activations hold the rows of the batch last, ``[channels, height, width, rows]``: whatever is done
to a pixel is done to all rows at once, a convolution is a product of matrices for each line of its
outputs, and the whole network is one node of autograd's graph; where the slope of a loss at its
outputs is known, there is no graph at all.
Values and gradients are those of the module to rounding.
"""

from fedistill.byhand.program import Program as Program
from fedistill.byhand.program import program_of as program_of
