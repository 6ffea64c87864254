if not __name__.startswith("graphnet."):
    raise ImportError("import it as graphnet.kernels; a bare `kernels` would be a second copy")
__doc__ = """Triton templates. They need torch and Triton alone and know nothing of graphnet.

A template computes fp32 tiles and hands them to one generated function,

    EPILOGUE(acc, aux, i0, i1, i2, i3, mask, args)

acc   the tile of the anchor's first result; aux that of its second, or 0
i0-3  index tensors, broadcastable to acc, of each element's logical position: n, c, h, w of an
      activation; o, i, r, s of a weight; row and column of a matrix; what is missing is 0
mask  which elements exist
args  a tuple of pointers, whose order only the generator knows

It loads further operands, computes, rounds once and stores all results. So a template knows no
output layout, no activation and no optimizer. Operands come with their strides, in elements, in
logical order; shapes, strides and tile sizes are constexprs. A kernel that also takes a
PRELOAD(i0, i1, i2, i3, mask, args) calls it before its loop: the tuple of operands that it returns
is what EPILOGUE finds in `aux`.

conv.py         implicit-GEMM convolution: forward, input gradient, weight gradient
conv_taps.py    the same for channels-last images with many channels, tap by tap
conv_rows.py    forward and input gradient, tiles of images by the copy engine
wgrad_rows.py   the weight gradient by filter rows, in segments, by the copy engine
gl_conv.py      forward and input gradient by specialised warps, in Gluon
gl_wgrad.py     the weight gradient by filter rows and specialised warps, in Gluon
augment.py      crops, warps, colours and the normalization of stored images
pack.py         space-to-depth; images innermost
linear.py       the fully connected products, and the ordered sum of their parts
linear_wgrad.py the weight gradient of fully connected layers with its update
lrn.py          local response normalization, alone and fused with a max-pool
pool.py         max, average and adaptive pooling, gradients by gathering
region.py       several stages in one launch, an image a program: region_conv.py (convolution and
                pool), region_grad.py (gradients), region_lanes.py (what a thread holds)
chunks.py       max-pools and normalization of channels-last images, 8 channels a thread
pool_tiles.py   max-pools between a channels-last image and a row-major pooled one
loss.py         softmax cross-entropy and multiclass hinge, with their gradients
elementwise.py  code without an anchor; the loss ring
reduce.py       ordered second passes: split-K partials, segments, sums
random.py       Philox4x32-10
common.py       casts, dots, index arithmetic
"""
