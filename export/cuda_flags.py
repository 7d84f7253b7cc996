"""How the generated CUDA is compiled."""

#: The source says itself where a product and a sum round once; everything else rounds as IEEE 754 has it.
CUDA_FLAGS = ("--fmad=false",)
