/* W with zeros anywhere: values, and of each its column (CSR), block by block.

   W is cut into blocks of so many inputs that a block of a tile stays in the first cache while all rows are multiplied by
   it: first all rows of the first block, then all of the second. A column is counted from the start of its block, and
   so fits into one byte. Of a few tokens the time is that of reading W, and of finding out where the next value belongs:
   for them masks say it, a byte for eight inputs of a row, in the order of the values. */

static int64_t value_count(const Job *job)
{
    return job->starts[(job->inputs + job->block - 1) / job->block * job->outputs];
}

/* NAME: rows of one block of W, times that block of a tile of N vectors' width, added to sums (rows, width). Each row is
   summed up in TURNS turns. */
#define ROWS(NAME, VECTOR, N, TURNS)                                                                                   \
    static void NAME(const float *x, const float *values, const uint8_t *columns, const int32_t *starts, int64_t rows, \
                     float *sums)                                                                                      \
    {                                                                                                                  \
        enum { EACH = sizeof(VECTOR) / sizeof(float), WIDTH = (N) * EACH, AT_ONCE = TURNS };                           \
        for (int64_t r = 0; r < rows; r++, sums += WIDTH) {                                                            \
            VECTOR sum[AT_ONCE][N];                                                                                    \
            for (int i = 0; i < N; i++)                                                                                \
                sum[0][i] = *(const VECTOR *)(sums + i * EACH);                                                        \
            for (int turn = 1; turn < AT_ONCE; turn++)                                                                 \
                for (int i = 0; i < N; i++)                                                                            \
                    sum[turn][i] = (VECTOR){0};                                                                        \
            int64_t p = starts[r], last = starts[r + 1];                                                               \
            for (; p + AT_ONCE <= last; p += AT_ONCE)                                                                  \
                for (int turn = 0; turn < AT_ONCE; turn++) {                                                           \
                    const float *at = x + (size_t)columns[p + turn] * WIDTH;                                           \
                    for (int i = 0; i < N; i++)                                                                        \
                        sum[turn][i] += *(const VECTOR *)(at + i * EACH) * values[p + turn];                           \
                }                                                                                                      \
            for (; p < last; p++)                                                                                      \
                for (int i = 0; i < N; i++)                                                                            \
                    sum[0][i] += *(const VECTOR *)(x + (size_t)columns[p] * WIDTH + i * EACH) * values[p];             \
            for (int turn = 1; turn < AT_ONCE; turn++)                                                                 \
                for (int i = 0; i < N; i++)                                                                            \
                    sum[0][i] += sum[turn][i];                                                                         \
            for (int i = 0; i < N; i++)                                                                                \
                *(VECTOR *)(sums + i * EACH) = sum[0][i];                                                              \
        }                                                                                                              \
    }
#define DEFINE(WIDTH, VECTOR, N, TURNS, R) ROWS(rows_##WIDTH, VECTOR, N, TURNS)
WIDTHS(DEFINE)
#undef DEFINE

/* Add the products of the outputs from first to last with one tile to sums (outputs, width). */
static void multiply_anywhere(const Job *job, const float *tile, int64_t width, int64_t first, int64_t last, float *sums)
{
    for (int64_t b = 0; b * job->block < job->inputs; b++) {
        const float *x = tile + b * job->block * width;
        const int32_t *starts = job->starts + b * job->outputs + first;
        switch (width) {
#define CASE(WIDTH, VECTOR, N, TURNS, R) \
    case WIDTH: rows_##WIDTH(x, job->values, job->columns, starts, last - first, sums); break;
            WIDTHS(CASE)
#undef CASE
        }
    }
}

#if defined(__AVX2__)
#define FEW 4 /* tokens at most */

/* For each byte: the places of its bits, counted from the lowest, and something negative where there is none. */
static uint64_t PLACES[256];

__attribute__((constructor)) static void fill_places(void)
{
    for (int byte = 0; byte < 256; byte++)
        for (int bit = 0, place = 0; bit < 8; bit++)
            PLACES[byte] |= (uint64_t)(byte >> bit & 1 ? place++ : 0x80) << 8 * bit;
}

/* The first of the values, one for each bit of the mask, where the bits are, and zeros elsewhere. Reads eight. (The
   instruction that AVX-512 has for this takes longer on an AMD EPYC.) */
static inline __m256 spread(uint8_t mask, const float *values)
{
    __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)&PLACES[mask]));
    __m256 chosen = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), places);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(places, 31)), chosen);
}

static inline float sum_of(__m256 x)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* Few tokens: vectors hold inputs. What is not zero of eight inputs is spread to their places and multiplied by the eight
   numbers of each token. sums (rows, N). */
#define FEW_ROWS(N, TURNS)                                                                                             \
    static void few_rows_##N(const Job *job, int64_t b, int64_t first, int64_t last, __m256 *sums)                     \
    {                                                                                                                  \
        int64_t from = b * job->block, left = job->inputs - from, size = left < job->block ? left : job->block;        \
        int64_t whole = size / 8, groups = (size + 7) / 8, rest = size % 8, inputs = job->inputs;                      \
        __m256i some = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)rest), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));    \
        const float *x = job->x + from;                                                                                \
        const uint8_t *masks = job->masks + from / 8 * job->outputs + first * groups;                                  \
        for (int64_t r = first; r < last; r++, masks += groups, sums += N) {                                           \
            const float *values = job->values + job->starts[b * job->outputs + r];                                     \
            __m256 sum[TURNS][N];                                                                                      \
            for (int t = 0; t < N; t++)                                                                                \
                for (int turn = 0; turn < TURNS; turn++)                                                               \
                    sum[turn][t] = turn ? _mm256_setzero_ps() : sums[t];                                               \
            int64_t g = 0;                                                                                             \
            for (; g + TURNS <= whole; g += TURNS)                                                                     \
                for (int turn = 0; turn < TURNS; turn++) {                                                             \
                    __m256 w = spread(masks[g + turn], values);                                                        \
                    values += __builtin_popcount(masks[g + turn]);                                                     \
                    for (int t = 0; t < N; t++)                                                                        \
                        sum[turn][t] += w * _mm256_loadu_ps(x + t * inputs + (g + turn) * 8);                          \
                }                                                                                                      \
            for (; g < groups; g++) {                                                                                  \
                __m256 w = spread(masks[g], values);                                                                   \
                values += __builtin_popcount(masks[g]);                                                                \
                for (int t = 0; t < N; t++)                                                                            \
                    sum[0][t] += w * (g < whole ? _mm256_loadu_ps(x + t * inputs + g * 8)                              \
                                                : _mm256_maskload_ps(x + t * inputs + g * 8, some));                   \
            }                                                                                                          \
            for (int t = 0; t < N; t++) {                                                                              \
                for (int turn = 1; turn < TURNS; turn++)                                                               \
                    sum[0][t] += sum[turn][t];                                                                         \
                sums[t] = sum[0][t];                                                                                   \
            }                                                                                                          \
        }                                                                                                              \
    }
FEW_ROWS(1, 4)
FEW_ROWS(2, 2)
FEW_ROWS(3, 2)
FEW_ROWS(4, 2)

/* Spreading costs the same however many zeros there are; what rows_4 does costs more, the more values there are. */
static int few(const Job *job)
{
    return job->tokens == 1 ||
           (job->tokens <= FEW && job->tokens * job->inputs * job->outputs <= 10 * value_count(job));
}

static void few_part(void *data, size_t index)
{
    const Job *job = data;
    int64_t n = job->tokens, from = (int64_t)index * job->part, room = SUMS / 8 / n;
    int64_t to = from + job->part < job->outputs ? from + job->part : job->outputs;
    __m256 sums[SUMS / 8];
    for (int64_t first = from; first < to; first += room) {
        int64_t last = first + room < to ? first + room : to;
        memset(sums, 0, (size_t)((last - first) * n) * sizeof(__m256));
        for (int64_t b = 0; b * job->block < job->inputs; b++)
            switch (n) {
            case 1: few_rows_1(job, b, first, last, sums); break;
            case 2: few_rows_2(job, b, first, last, sums); break;
            case 3: few_rows_3(job, b, first, last, sums); break;
            default: few_rows_4(job, b, first, last, sums);
            }
        for (int64_t r = first; r < last; r++)
            for (int64_t t = 0; t < n; t++)
                job->y[t * job->outputs + r] = job->bias[r] + sum_of(sums[(r - first) * n + t]);
    }
}
#endif
