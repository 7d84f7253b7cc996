/*
 * The template's own functions, for whoever wants to measure them, a block at a time as the template calls them.
 * Compile as a shared library of the default sizes.
 */
#include "rfsq_tokenizer.c"

enum { BLOCK = 64 };

void mish_of(int blocks, float *values);
void tanh_of(int blocks, float *values);

void mish_of(int blocks, float *values)
{
    for (int block = 0; block < blocks; ++block)
        mish(BLOCK, values + block * BLOCK);
}

void tanh_of(int blocks, float *values)
{
    for (int block = 0; block < blocks; ++block)
        hyperbolic_tangent(BLOCK, 10, values + block * BLOCK);
}
