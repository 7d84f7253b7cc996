// What a C++ controller does with the header, as C++17.
#include "rfsq_tokenizer.h"

#include <array>
#include <cstdint>
#include <cstring>

static_assert(RFSQ_NUM_LEVELS >= 2, "macros are constants");
static_assert(RFSQ_ACTION_LIMIT > 1.0f, "hexadecimal numbers are C++17");

int main()
{
    std::array<std::int32_t, RFSQ_CHUNK_LENGTH * RFSQ_LATENT_DIM * RFSQ_NUM_LAYERS> tokens{};
    std::array<float, RFSQ_CHUNK_LENGTH * RFSQ_ACTION_DIM> actions{};
    if (std::strlen(RFSQ_FINGERPRINT) != 64 || DECODE(tokens.data(), 1, actions.data()) != RFSQ_OK)
        return 1;
    tokens[0] = RFSQ_NUM_LEVELS;
    return DECODE(tokens.data(), 1, actions.data()) == RFSQ_ILLEGAL_VALUE ? 0 : 2;
}
