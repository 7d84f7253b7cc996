/* For what must round alike wherever it is called from: compilers may round copies of it differently. */
#ifdef __GNUC__
#define ONE_COPY __attribute__((noinline))
#else
#define ONE_COPY
#endif
