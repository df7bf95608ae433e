/* W in 2:4: of each four inputs of a row two values, zeros among them where there are fewer, and two bits each that say
   which of the four.

   W is cut into blocks of 96 inputs, so much of a tile as stays in the first cache while all rows are multiplied by it.
   In a block 16 rows lie together: values (blocks, groups of 16 rows, 48, 16), words (blocks, groups, 3, 16), a word
   holding the bits of the 16 values of 32 inputs, the first in the lowest; the last block is as short as it has inputs,
   its last word padded. So every row takes the same time, and W is a little more than half as large as it was dense. */

#define GROUP 16
#define WORD 32
#define BLOCK_2OF4 96
#define LINES (BLOCK_2OF4 / 2 / GROUP) /* of values, for each row of a group */

typedef struct {
    const float *values;   /* of the first group */
    const uint32_t *words; /* likewise */
    int64_t from, size, word_count;
} Block;

/* The block of W that begins with the input from. */
static Block block_at(const Job *job, int64_t from)
{
    int64_t left = job->inputs - from, size = left < BLOCK_2OF4 ? left : BLOCK_2OF4;
    int64_t rows = (job->outputs + GROUP - 1) / GROUP * GROUP;
    return (Block){job->values + rows * from / 2, job->words + rows * (from / WORD), from, size, (size + WORD - 1) / WORD};
}

/* NAME: rows from first to last of a block of W, which begin a group, times that block x of a tile of N vectors' width,
   added to sums (rows, width). R rows at once, of the last group perhaps some that only pad it; meanwhile a part of the
   next group's values is fetched. */
#define ROWS_2OF4(NAME, VECTOR, N, R)                                                                                  \
    static void NAME(const Block *block, const float *x, int64_t first, int64_t last, float *sums)                     \
    {                                                                                                                  \
        enum { EACH = sizeof(VECTOR) / sizeof(float), WIDTH = (N) * EACH };                                            \
        for (int64_t r = first; r < last; r += R, sums += R * WIDTH) {                                                 \
            const float *value = block->values + r / GROUP * block->size / 2 * GROUP + r % GROUP, *four = x;           \
            const uint32_t *words = block->words + r / GROUP * block->word_count * GROUP + r % GROUP;                  \
            const float *next = value - r % GROUP + (block->size / 2 + r % GROUP * LINES) * GROUP;                     \
            for (int line = 0; line < LINES * R; line++)                                                               \
                __builtin_prefetch(next + line * GROUP);                                                               \
            VECTOR sum[R][N];                                                                                          \
            for (int q = 0; q < R; q++)                                                                                \
                for (int i = 0; i < N; i++)                                                                            \
                    sum[q][i] = *(const VECTOR *)(sums + q * WIDTH + i * EACH);                                        \
            for (int64_t left = block->size; left > 0; left -= WORD, words += GROUP) {                                 \
                uint32_t word[R];                                                                                      \
                for (int q = 0; q < R; q++)                                                                            \
                    word[q] = words[q];                                                                                \
                int count = (int)(left < WORD ? left : WORD) / 4;                                                      \
                for (int g = 0; g < count; g++, four += 4 * WIDTH)                                                     \
                    for (int turn = 0; turn < 2; turn++, value += GROUP)                                               \
                        for (int q = 0; q < R; q++) {                                                                  \
                            const float *at = four + (word[q] & 3) * WIDTH;                                            \
                            for (int i = 0; i < N; i++)                                                                \
                                sum[q][i] += *(const VECTOR *)(at + i * EACH) * value[q];                              \
                            word[q] >>= 2;                                                                             \
                        }                                                                                              \
            }                                                                                                          \
            for (int q = 0; q < R; q++)                                                                                \
                for (int i = 0; i < N; i++)                                                                            \
                    *(VECTOR *)(sums + q * WIDTH + i * EACH) = sum[q][i];                                              \
        }                                                                                                              \
    }
#define DEFINE(WIDTH, VECTOR, N, TURNS, R) ROWS_2OF4(rows_2of4_##WIDTH, VECTOR, N, R)
WIDTHS(DEFINE)
#undef DEFINE

/* As multiply_anywhere. */
static void multiply_2of4(const Job *job, const float *tile, int64_t width, int64_t first, int64_t last, float *sums)
{
    for (int64_t from = 0; from < job->inputs; from += BLOCK_2OF4) {
        const Block at = block_at(job, from), *block = &at;
        const float *x = tile + from * width;
        switch (width) {
#define CASE(WIDTH, VECTOR, N, TURNS, R) case WIDTH: rows_2of4_##WIDTH(block, x, first, last, sums); break;
            WIDTHS(CASE)
#undef CASE
        }
    }
}

#if defined(__AVX2__)
#define DIRECT 12 /* tokens at most */
#if defined(__AVX512F__)
typedef __m512 lanes;
typedef __m512i bits;
#define LOAD(p) _mm512_loadu_ps(p)
#define LOAD_BITS(p) _mm512_loadu_si512(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define FOUR(p) _mm512_broadcast_f32x4(_mm_loadu_ps(p))
#define CHOOSE(four, b) _mm512_permutevar_ps(four, b)
#define NEXT(b) _mm512_srli_epi32(b, 2)
#else
typedef __m256 lanes;
typedef __m256i bits;
#define LOAD(p) _mm256_loadu_ps(p)
#define LOAD_BITS(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define FOUR(p) _mm256_broadcast_ps((const __m128 *)(p))
#define CHOOSE(four, b) _mm256_permutevar_ps(four, b)
#define NEXT(b) _mm256_srli_epi32(b, 2)
#endif
enum { ROWS_AT_ONCE = sizeof(lanes) / sizeof(float) };

/* Few tokens: vectors hold rows. Of four inputs of a token each row chooses two by its bits. ROWS_AT_ONCE rows from row on,
   times N tokens from the token on, are added to sums (tokens, GROUP). */
#define DIRECT_ROWS(N)                                                                                                 \
    static void direct_rows_##N(const Job *job, const Block *block, int64_t row, int64_t token, float *sums)           \
    {                                                                                                                  \
        const float *values = block->values + row / GROUP * block->size / 2 * GROUP + row % GROUP;                     \
        const uint32_t *words = block->words + row / GROUP * block->word_count * GROUP + row % GROUP;                  \
        int64_t inputs = job->inputs;                                                                                  \
        const float *x = job->x + token * inputs + block->from;                                                        \
        lanes sum[2][N];                                                                                               \
        for (int t = 0; t < N; t++) {                                                                                  \
            sum[0][t] = LOAD(sums + t * GROUP);                                                                        \
            sum[1][t] = (lanes){0};                                                                                    \
        }                                                                                                              \
        for (int64_t left = block->size; left > 0; left -= WORD, words += GROUP) {                                     \
            bits first = LOAD_BITS(words);                                                                             \
            int64_t count = (left < WORD ? left : WORD) / 4;                                                           \
            for (int64_t g = 0; g < count; g++, values += 2 * GROUP, x += 4) {                                         \
                lanes one = LOAD(values), other = LOAD(values + GROUP);                                                \
                bits second = NEXT(first);                                                                             \
                for (int t = 0; t < N; t++) {                                                                          \
                    lanes four = FOUR(x + t * inputs);                                                                 \
                    sum[0][t] += CHOOSE(four, first) * one;                                                            \
                    sum[1][t] += CHOOSE(four, second) * other;                                                         \
                }                                                                                                      \
                first = NEXT(second);                                                                                  \
            }                                                                                                          \
        }                                                                                                              \
        for (int t = 0; t < N; t++)                                                                                    \
            STORE(sums + t * GROUP, sum[0][t] + sum[1][t]);                                                            \
    }
DIRECT_ROWS(1)
DIRECT_ROWS(2)
DIRECT_ROWS(3)
DIRECT_ROWS(4)
DIRECT_ROWS(5)
DIRECT_ROWS(6)
DIRECT_ROWS(7)
DIRECT_ROWS(8)

/* A group of rows times all tokens, eight at a time. */
static void direct_group(const Job *job, const Block *block, int64_t row, float *sums)
{
    for (int64_t token = 0; token < job->tokens; token += 8)
        for (int part = 0; part < GROUP; part += ROWS_AT_ONCE) {
            float *to = sums + token * GROUP + part;
            switch (job->tokens - token) {
            case 1: direct_rows_1(job, block, row + part, token, to); break;
            case 2: direct_rows_2(job, block, row + part, token, to); break;
            case 3: direct_rows_3(job, block, row + part, token, to); break;
            case 4: direct_rows_4(job, block, row + part, token, to); break;
            case 5: direct_rows_5(job, block, row + part, token, to); break;
            case 6: direct_rows_6(job, block, row + part, token, to); break;
            case 7: direct_rows_7(job, block, row + part, token, to); break;
            default: direct_rows_8(job, block, row + part, token, to);
            }
        }
}

static void direct_part(void *data, size_t index)
{
    const Job *job = data;
    int64_t from = (int64_t)index * job->part, tokens = job->tokens, room = SUMS / tokens / GROUP * GROUP;
    int64_t to = from + job->part < job->outputs ? from + job->part : job->outputs;
    float sums[SUMS] __attribute__((aligned(64)));
    for (int64_t first = from; first < to; first += room) {
        int64_t last = first + room < to ? first + room : to;
        memset(sums, 0, sizeof(float) * (size_t)((last - first + GROUP - 1) / GROUP * GROUP * tokens));
        for (int64_t input = 0; input < job->inputs; input += BLOCK_2OF4) {
            const Block block = block_at(job, input);
            for (int64_t row = first; row < last; row += GROUP)
                direct_group(job, &block, row, sums + (row - first) * tokens);
        }
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t r = first; r < last; r++) {
                int64_t group = (r - first) / GROUP, lane = (r - first) % GROUP;
                job->y[t * job->outputs + r] = job->bias[r] + sums[(group * tokens + t) * GROUP + lane];
            }
    }
}
#endif
