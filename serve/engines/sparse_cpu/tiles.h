/* Vectors, and x in tiles: what both ways to hold a sparse W share. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define LANES (BYTES / 4)
#define STEP 16 /* what widths of whole vectors and parts of the outputs are multiples of */
#define TILE 64 /* tokens */
#define SUMS (256 * TILE) /* floats that hold what a part of the outputs has summed up so far */

typedef float vec __attribute__((vector_size(BYTES), aligned(4)));
typedef float quad __attribute__((vector_size(16), aligned(4)));
#if BYTES >= 32
typedef float eight __attribute__((vector_size(32), aligned(4)));
#else
typedef quad eight; /* half of them */
#endif
#define EIGHTS (32 / (int)sizeof(eight))
#define VECS (STEP / LANES)

/* X(WIDTH, VECTOR, N, TURNS, R): the widths of tiles, each of N vectors, and into how many sums a row is split (TURNS) or
   how many rows are multiplied together (R), so that there are enough sums for the processor to work at all the time and no
   more than it has registers for. */
#define WIDTHS(X)                                                                                                      \
    X(1, float, 1, 4, 4)                                                                                               \
    X(4, quad, 1, 4, 4)                                                                                                \
    X(8, eight, EIGHTS, 4, 4)                                                                                          \
    X(16, vec, VECS, (VECS < 4 ? 4 / VECS : 1), 4)                                                                     \
    X(24, eight, 3 * EIGHTS, 2, 2)                                                                                     \
    X(32, vec, 2 * VECS, (VECS < 2 ? 2 : 1), (VECS < 2 ? 4 : 2))                                                       \
    X(40, eight, 5 * EIGHTS, 2, 2)                                                                                     \
    X(48, vec, 3 * VECS, 1, (VECS < 2 ? 2 : 1))                                                                        \
    X(56, eight, 7 * EIGHTS, 1, 1)                                                                                     \
    X(64, vec, 4 * VECS, 1, (VECS < 2 ? 2 : 1))

typedef int32_t pick __attribute__((vector_size(16)));

#if defined(__clang__)
#define TWO(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define TWO(a, b, i, j, k, l) __builtin_shuffle(a, b, (pick){i, j, k, l})
#endif

static inline void transpose4(const float *from, size_t a, float *to, size_t b)
{
    quad x = *(const quad *)from, y = *(const quad *)(from + a);
    quad z = *(const quad *)(from + 2 * a), w = *(const quad *)(from + 3 * a);
    quad low = TWO(x, y, 0, 4, 1, 5), low2 = TWO(z, w, 0, 4, 1, 5);
    quad high = TWO(x, y, 2, 6, 3, 7), high2 = TWO(z, w, 2, 6, 3, 7);
    *(quad *)to = TWO(low, low2, 0, 1, 4, 5);
    *(quad *)(to + b) = TWO(low, low2, 2, 3, 6, 7);
    *(quad *)(to + 2 * b) = TWO(high, high2, 0, 1, 4, 5);
    *(quad *)(to + 3 * b) = TWO(high, high2, 2, 3, 6, 7);
}

/* (rows, columns), a apart, to (columns, rows), b apart. */
static void transpose(const float *from, size_t a, float *to, size_t b, int64_t rows, int64_t columns)
{
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        int64_t c = 0;
        for (; c + 4 <= columns; c += 4)
            transpose4(from + r * a + c, a, to + c * b + r, b);
        for (; c < columns; c++)
            for (int i = 0; i < 4; i++)
                to[c * b + r + i] = from[(r + i) * a + c];
    }
    for (; r < rows; r++)
        for (int64_t c = 0; c < columns; c++)
            to[c * b + r] = from[r * a + c];
}

typedef struct {
    const float *x, *values, *bias;
    const uint8_t *columns, *masks; /* zeros anywhere */
    const int32_t *starts;
    const uint32_t *words; /* 2:4; else NULL */
    float *y, *tiles;
    int64_t tokens, inputs, outputs, block, tile_count, parts, part;
} Job;

static int64_t tokens_of(const Job *job, int64_t tile)
{
    int64_t left = job->tokens - tile * TILE;
    return left < TILE ? left : TILE;
}

static int64_t width_of(const Job *job, int64_t tile)
{
    int64_t tokens = tokens_of(job, tile);
    return tokens == 1 ? 1 : tokens <= 4 ? 4 : (tokens + 7) / 8 * 8;
}

static void fill_tile(void *data, size_t index)
{
    const Job *job = data;
    int64_t tile = (int64_t)index, tokens = tokens_of(job, tile), width = width_of(job, tile);
    float *to = job->tiles + tile * TILE * job->inputs;
    if (tokens < width)
        for (int64_t c = 0; c < job->inputs; c++)
            memset(to + c * width + tokens, 0, (size_t)(width - tokens) * sizeof(float));
    transpose(job->x + tile * TILE * job->inputs, (size_t)job->inputs, to, (size_t)width, tokens, job->inputs);
}
