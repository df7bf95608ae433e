/* y = x W' + b on a processor, W sparse: rows of values and their columns (CSR), everything else dense and float32.

   A row of W times 64 tokens: each value is multiplied by the 64 numbers that its input has, one after another, so that a
   vector holds tokens, and the only numbers read twice are the inputs, from the cache. For that x (tokens, inputs) is
   written into tiles (inputs, 64 tokens) first, and what comes out is turned back, sixteen outputs at a time. The last
   tile is as narrow as a multiple of 16 tokens can be.

   Below the product stands the operator of ONNX Runtime, domain pst, name SparseLinear: inputs x (..., inputs), values (n)
   float, columns (n) int32, starts (outputs + 1) int32, bias (outputs); attribute threads; output (..., outputs). It asks
   for the runtime's functions by their places in OrtApi, which never change, so that none of its headers is needed. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define LANES (BYTES / 4)
#define STEP 16
#define TILE 64

typedef float vec __attribute__((vector_size(BYTES), aligned(4)));
typedef float quad __attribute__((vector_size(16), aligned(4)));
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

/* One row of W times a tile of N times STEP tokens. */
#define ROW(N)                                                                                                         \
    static inline void row_##N(const float *x, const float *values, const int32_t *columns, int64_t count, float bias, \
                               float *y)                                                                               \
    {                                                                                                                  \
        vec sum[N * STEP / LANES];                                                                                     \
        for (int i = 0; i < N * STEP / LANES; i++)                                                                     \
            sum[i] = (vec){} + bias;                                                                                   \
        for (int64_t p = 0; p < count; p++) {                                                                          \
            const float *at = x + (size_t)columns[p] * (N * STEP);                                                     \
            float value = values[p];                                                                                   \
            for (int i = 0; i < N * STEP / LANES; i++)                                                                 \
                sum[i] += *(const vec *)(at + i * LANES) * value;                                                      \
        }                                                                                                              \
        for (int i = 0; i < N * STEP / LANES; i++)                                                                     \
            *(vec *)(y + i * LANES) = sum[i];                                                                          \
    }
ROW(1)
ROW(2)
ROW(3)
ROW(4)

typedef struct {
    const float *x, *values, *bias;
    const int32_t *columns, *starts;
    float *y, *tiles;
    int64_t tokens, inputs, outputs, tile_count, parts, part;
} Job;

static int64_t tokens_of(const Job *job, int64_t tile)
{
    int64_t left = job->tokens - tile * TILE;
    return left < TILE ? left : TILE;
}

static int64_t width_of(const Job *job, int64_t tile)
{
    return (tokens_of(job, tile) + STEP - 1) / STEP * STEP;
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

/* Part number index % parts of the outputs, for one tile. */
static void multiply_part(void *data, size_t index)
{
    const Job *job = data;
    int64_t tile = (int64_t)index / job->parts, first = (int64_t)index % job->parts * job->part;
    int64_t last = first + job->part < job->outputs ? first + job->part : job->outputs;
    int64_t tokens = tokens_of(job, tile), width = width_of(job, tile);
    const float *x = job->tiles + tile * TILE * job->inputs;
    float rows[STEP * TILE] __attribute__((aligned(64)));
    for (int64_t i = first; i < last; i += STEP) {
        int64_t count = last - i < STEP ? last - i : STEP;
        for (int64_t r = 0; r < count; r++) {
            int64_t p = job->starts[i + r], n = job->starts[i + r + 1] - p;
            const float *values = job->values + p;
            const int32_t *columns = job->columns + p;
            float *y = rows + r * width;
            switch (width / STEP) {
            case 1: row_1(x, values, columns, n, job->bias[i + r], y); break;
            case 2: row_2(x, values, columns, n, job->bias[i + r], y); break;
            case 3: row_3(x, values, columns, n, job->bias[i + r], y); break;
            default: row_4(x, values, columns, n, job->bias[i + r], y);
            }
        }
        transpose(rows, (size_t)width, job->y + tile * TILE * job->outputs + i, (size_t)job->outputs, count, tokens);
    }
}

/* Without memory for the tiles: slow, and the same sums but for their order. */
static void multiply_plainly(const Job *job)
{
    for (int64_t t = 0; t < job->tokens; t++)
        for (int64_t i = 0; i < job->outputs; i++) {
            float sum = job->bias[i];
            for (int32_t p = job->starts[i]; p < job->starts[i + 1]; p++)
                sum += job->values[p] * job->x[t * job->inputs + job->columns[p]];
            job->y[t * job->outputs + i] = sum;
        }
}

typedef void (*Task)(void *, size_t);
typedef void (*Parallel)(void *context, Task task, size_t count, void *data);

static void in_turn(void *context, Task task, size_t count, void *data)
{
    (void)context;
    for (size_t i = 0; i < count; i++)
        task(data, i);
}

/* x (tokens, inputs), y (tokens, outputs). run calls task(data, i) for every i below count, in any order. */
static void sparse_linear(Job job, int64_t threads, Parallel run, void *context)
{
    if (job.tokens <= 0 || job.outputs <= 0)
        return;
    job.tile_count = (job.tokens + TILE - 1) / TILE;
    size_t wanted = (size_t)((job.tile_count - 1) * TILE + width_of(&job, job.tile_count - 1)) * (size_t)job.inputs;
    job.tiles = malloc(wanted * sizeof(float) + 64);
    if (job.tiles == NULL) {
        multiply_plainly(&job);
        return;
    }
    void *memory = job.tiles;
    job.tiles = (float *)(((uintptr_t)memory + 63) / 64 * 64);
    int64_t parts = threads > 1 ? (4 * threads + job.tile_count - 1) / job.tile_count : 1;
    job.part = ((job.outputs + parts - 1) / parts + STEP - 1) / STEP * STEP;
    job.parts = (job.outputs + job.part - 1) / job.part;
    if (threads > 1) {
        run(context, fill_tile, (size_t)job.tile_count, &job);
        run(context, multiply_part, (size_t)(job.tile_count * job.parts), &job);
    } else {
        for (int64_t tile = 0; tile < job.tile_count; tile++) { /* a tile is still in the cache when it is needed */
            fill_tile(&job, (size_t)tile);
            multiply_part(&job, (size_t)tile);
        }
    }
    free(memory);
}

/* For whoever has pointers: on one thread. */
void pst_sparse_linear(const float *x, const float *values, const int32_t *columns, const int32_t *starts,
                       const float *bias, float *y, int64_t tokens, int64_t inputs, int64_t outputs)
{
    Job job = {.x = x, .values = values, .bias = bias, .columns = columns, .starts = starts, .y = y,
               .tokens = tokens, .inputs = inputs, .outputs = outputs};
    sparse_linear(job, 1, in_turn, NULL);
}

/* ---- the operator ------------------------------------------------------------------------------------------------- */

typedef void *(*Function)(void);
typedef struct { /* OrtApi: functions by their places */
    Function at[275];
} Api;
typedef struct { /* OrtApiBase */
    const Api *(*get_api)(uint32_t version);
    const char *(*get_version)(void);
} ApiBase;
enum { /* places in OrtApi, the same since the versions 1 and, of the last, 17 of its interface */
    CREATE_DOMAIN = 26, ADD_TO_DOMAIN = 27, ADD_DOMAIN = 28, DATA = 51, RANK = 61, DIMENSIONS = 62, TYPE_AND_SHAPE = 65,
    INTEGER_ATTRIBUTE = 86, INPUT = 90, OUTPUT = 91, RELEASE_STATUS = 93, RELEASE_SHAPE = 99, PARALLEL_FOR = 274
};
enum { FLOAT = 1, INT32 = 6 }; /* ONNXTensorElementDataType */
#define CALL(api, place, ...) (((void *(*)())(api)->at[place])(__VA_ARGS__))

typedef struct {
    const Api *api;
    int64_t threads;
} Kernel;
typedef struct {
    const Api *api;
    void *context;
} Pool;

static void in_parallel(void *context, Task task, size_t count, void *data)
{
    const Pool *pool = context;
    void *status = CALL(pool->api, PARALLEL_FOR, pool->context, task, count, (size_t)0, data);
    if (status != NULL) {
        CALL(pool->api, RELEASE_STATUS, status);
        in_turn(NULL, task, count, data);
    }
}

static void *create(const void *op, const Api *api, const void *info)
{
    (void)op;
    Kernel *kernel = calloc(1, sizeof(Kernel));
    if (kernel == NULL)
        return NULL;
    kernel->api = api;
    kernel->threads = 1;
    void *status = CALL(api, INTEGER_ATTRIBUTE, info, "threads", &kernel->threads);
    if (status != NULL)
        CALL(api, RELEASE_STATUS, status);
    return kernel;
}

static void destroy(void *kernel) { free(kernel); }

/* The number of dimensions, which are put into sizes; -1 where there are too many. */
static int64_t dimensions(const Api *api, const void *value, int64_t *sizes, size_t most)
{
    void *shape = NULL;
    size_t rank = 0;
    CALL(api, TYPE_AND_SHAPE, value, &shape);
    CALL(api, RANK, shape, &rank);
    if (rank <= most)
        CALL(api, DIMENSIONS, shape, sizes, rank);
    CALL(api, RELEASE_SHAPE, shape);
    return rank <= most ? (int64_t)rank : -1;
}

static void compute(void *state, void *context)
{
    const Kernel *kernel = state;
    if (kernel == NULL)
        return;
    const Api *api = kernel->api;
    const void *values[5] = {0};
    void *data[5] = {0}, *output = NULL, *y = NULL;
    int64_t sizes[8] = {0}, starts = 0;
    for (size_t i = 0; i < 5; i++) {
        CALL(api, INPUT, context, i, &values[i]);
        CALL(api, DATA, values[i], &data[i]);
    }
    int64_t rank = dimensions(api, values[0], sizes, 8);
    if (rank < 1 || dimensions(api, values[3], &starts, 1) != 1)
        return;
    Job job = {.x = data[0], .values = data[1], .columns = data[2], .starts = data[3], .bias = data[4],
               .inputs = sizes[rank - 1], .outputs = starts - 1, .tokens = 1};
    for (int64_t i = 0; i + 1 < rank; i++)
        job.tokens *= sizes[i];
    sizes[rank - 1] = job.outputs;
    CALL(api, OUTPUT, context, (size_t)0, sizes, (size_t)rank, &output);
    CALL(api, DATA, output, &y);
    job.y = y;
    Pool pool = {api, context};
    sparse_linear(job, kernel->threads, in_parallel, &pool);
}

static const char *name(const void *op) { (void)op; return "SparseLinear"; }
static const char *provider(const void *op) { (void)op; return NULL; }
static int input_type(const void *op, size_t i) { (void)op; return i == 2 || i == 3 ? INT32 : FLOAT; }
static size_t input_count(const void *op) { (void)op; return 5; }
static int output_type(const void *op, size_t i) { (void)op; (void)i; return FLOAT; }
static size_t output_count(const void *op) { (void)op; return 1; }
static int required(const void *op, size_t i) { (void)op; (void)i; return 0; }

static const struct { /* OrtCustomOp as of version 8 */
    uint32_t version;
    void *(*create)(const void *, const Api *, const void *);
    const char *(*name)(const void *);
    const char *(*provider)(const void *);
    int (*input_type)(const void *, size_t);
    size_t (*input_count)(const void *);
    int (*output_type)(const void *, size_t);
    size_t (*output_count)(const void *);
    void (*compute)(void *, void *);
    void (*destroy)(void *);
    int (*input_kind)(const void *, size_t);
    int (*output_kind)(const void *, size_t);
} OPERATOR = {8, create, name, provider, input_type, input_count, output_type, output_count, compute, destroy, required,
              required};

/* ONNX Runtime calls this for SessionOptions.register_custom_ops_library; NULL is success. */
void *RegisterCustomOps(void *options, const ApiBase *base)
{
    const Api *api = base->get_api(17);
    void *domain = NULL, *status = CALL(api, CREATE_DOMAIN, "pst", &domain);
    if (status == NULL)
        status = CALL(api, ADD_TO_DOMAIN, domain, &OPERATOR);
    if (status == NULL)
        status = CALL(api, ADD_DOMAIN, options, domain);
    return status;
}
