/* y = x W' + b on a processor, W sparse, everything else dense and float32.

   A row of W times 64 tokens: each value is multiplied by the 64 numbers that its input has, one after another, so that a
   vector holds tokens, and the only numbers read twice are the inputs. For that x (tokens, inputs) is written into tiles
   (inputs, 64 tokens) first, and what comes out is turned back. The last tile is as narrow as its tokens allow; a single
   token is its own tile. For a few tokens there are other ways, in the files that say how W is held.

   Below the product stand the operators of ONNX Runtime, domain pst, with x (..., inputs) and output (..., outputs):
     SparseLinear     inputs x, values (n) float, and eight more that are read and not used, columns (n) uint8, masks
                      (bytes) uint8, starts (blocks * outputs + 1) int32, bias (outputs); attributes block (inputs of
                      each but the last, a multiple of eight, 256 at most) and threads: see anywhere.h
     TwoOfFourLinear  inputs x, values float and words uint32 as in two_of_four.h, bias (outputs); attribute threads
   They ask for the runtime's functions by their places in OrtApi, which never change, so that none of its headers is
   needed. */
#include "tiles.h"

#include "anywhere.h"
#include "two_of_four.h"

/* Part number index % parts of the outputs, for one tile. */
static void multiply_part(void *data, size_t index)
{
    const Job *job = data;
    int64_t tile = (int64_t)index / job->parts, first = (int64_t)index % job->parts * job->part;
    int64_t last = first + job->part < job->outputs ? first + job->part : job->outputs;
    int64_t tokens = tokens_of(job, tile), width = width_of(job, tile), room = SUMS / width / GROUP * GROUP;
    const float *x = job->tiles + tile * TILE * job->inputs;
    float sums[SUMS] __attribute__((aligned(64)));
    for (int64_t i = first; i < last; i += room) {
        int64_t end = i + room < last ? i + room : last;
        for (int64_t r = i; r < end; r++)
            for (int64_t t = 0; t < width; t++)
                sums[(r - i) * width + t] = job->bias[r];
        if (job->words != NULL)
            multiply_2of4(job, x, width, i, end, sums);
        else
            multiply_anywhere(job, x, width, i, end, sums);
        transpose(sums, (size_t)width, job->y + tile * TILE * job->outputs + i, (size_t)job->outputs, end - i, tokens);
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

/* Multiplications below which waking other threads takes longer than they save. */
#define LEAST_TO_SHARE (1 << 15)

/* x (tokens, inputs), y (tokens, outputs). run calls task(data, i) for every i below count, in any order. */
static void sparse_linear(Job job, int64_t threads, Parallel run, void *context)
{
    if (job.tokens <= 0 || job.outputs <= 0)
        return;
    int64_t values = job.words != NULL ? job.inputs * job.outputs / 2 : value_count(&job);
    if (threads <= 1 || values * job.tokens < LEAST_TO_SHARE) {
        threads = 1;
        run = in_turn;
    }
    job.tile_count = (job.tokens + TILE - 1) / TILE;
    int64_t parts = threads > 1 ? (4 * threads + job.tile_count - 1) / job.tile_count : 1;
    job.part = ((job.outputs + parts - 1) / parts + STEP - 1) / STEP * STEP;
    job.parts = (job.outputs + job.part - 1) / job.part;
#if defined(__AVX2__)
    if (job.words != NULL ? job.tokens <= DIRECT : few(&job)) {
        run(context, job.words != NULL ? direct_part : few_part, (size_t)job.parts, &job);
        return;
    }
#endif
    if (job.tokens == 1) {
        job.tiles = (float *)job.x; /* only read */
        run(context, multiply_part, (size_t)job.parts, &job);
        return;
    }
    size_t wanted = (size_t)((job.tile_count - 1) * TILE + width_of(&job, job.tile_count - 1)) * (size_t)job.inputs;
    void *memory = malloc(wanted * sizeof(float) + 64);
    if (memory == NULL) { /* slowly: one token after another */
        for (Job one = job; job.tokens > 0; job.tokens--, one.x += job.inputs, one.y += job.outputs) {
            one.tokens = 1;
            sparse_linear(one, threads, run, context);
        }
        return;
    }
    job.tiles = (float *)(((uintptr_t)memory + 63) / 64 * 64);
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
void pst_sparse_linear(const float *x, const float *values, const uint8_t *columns, const uint8_t *masks,
                       const int32_t *starts, const float *bias, float *y, int64_t tokens, int64_t inputs, int64_t outputs,
                       int64_t block)
{
    Job job = {.x = x, .values = values, .bias = bias, .columns = columns, .masks = masks, .starts = starts, .y = y,
               .tokens = tokens, .inputs = inputs, .outputs = outputs, .block = block};
    sparse_linear(job, 1, in_turn, NULL);
}

void pst_two_of_four_linear(const float *x, const float *values, const uint32_t *words, const float *bias, float *y,
                            int64_t tokens, int64_t inputs, int64_t outputs)
{
    Job job = {.x = x, .values = values, .bias = bias, .words = words, .y = y, .tokens = tokens, .inputs = inputs,
               .outputs = outputs};
    sparse_linear(job, 1, in_turn, NULL);
}

/* ---- the operators ------------------------------------------------------------------------------------------------ */

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
enum { FLOAT = 1, UINT8 = 2, INT32 = 6, UINT32 = 12, MOST_INPUTS = 6 }; /* ONNXTensorElementDataType */
#define CALL(api, place, ...) (((void *(*)())(api)->at[place])(__VA_ARGS__))

typedef struct { /* OrtCustomOp as of version 8, and behind it what our functions read */
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
    const char *called;
    size_t inputs; /* the first is x, the last the bias */
    int types[MOST_INPUTS];
} Operator;

typedef struct {
    const Api *api;
    const Operator *operator;
    int64_t threads, block;
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
    Kernel *kernel = calloc(1, sizeof(Kernel));
    if (kernel == NULL)
        return NULL;
    kernel->api = api;
    kernel->operator = op;
    const char *names[] = {"threads", "block"};
    int64_t *places[] = {&kernel->threads, &kernel->block};
    for (int i = 0; i < 2; i++) {
        *places[i] = 1;
        void *status = CALL(api, INTEGER_ATTRIBUTE, info, names[i], places[i]);
        if (status != NULL)
            CALL(api, RELEASE_STATUS, status);
    }
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
    size_t inputs = kernel->operator->inputs;
    const void *values[MOST_INPUTS] = {0};
    void *data[MOST_INPUTS] = {0}, *output = NULL, *y = NULL;
    int64_t sizes[8] = {0}, outputs = 0;
    for (size_t i = 0; i < inputs; i++) {
        CALL(api, INPUT, context, i, &values[i]);
        CALL(api, DATA, values[i], &data[i]);
    }
    int64_t rank = dimensions(api, values[0], sizes, 8);
    if (rank < 1 || dimensions(api, values[inputs - 1], &outputs, 1) != 1)
        return;
    Job job = {.x = data[0], .values = data[1], .bias = data[inputs - 1], .inputs = sizes[rank - 1], .outputs = outputs,
               .tokens = 1, .block = kernel->block};
    if (kernel->operator->types[2] == UINT32) {
        job.words = data[2];
    } else {
        job.columns = data[2];
        job.masks = data[3];
        job.starts = data[4];
    }
    for (int64_t i = 0; i + 1 < rank; i++)
        job.tokens *= sizes[i];
    sizes[rank - 1] = job.outputs;
    CALL(api, OUTPUT, context, (size_t)0, sizes, (size_t)rank, &output);
    CALL(api, DATA, output, &y);
    job.y = y;
    Pool pool = {api, context};
    sparse_linear(job, kernel->threads, in_parallel, &pool);
}

static const char *name(const void *op) { return ((const Operator *)op)->called; }
static const char *provider(const void *op) { (void)op; return NULL; }
static int input_type(const void *op, size_t i) { return ((const Operator *)op)->types[i]; }
static size_t input_count(const void *op) { return ((const Operator *)op)->inputs; }
static int output_type(const void *op, size_t i) { (void)op; (void)i; return FLOAT; }
static size_t output_count(const void *op) { (void)op; return 1; }
static int required(const void *op, size_t i) { (void)op; (void)i; return 0; }

#define FUNCTIONS                                                                                                      \
    8, create, name, provider, input_type, input_count, output_type, output_count, compute, destroy, required, required
static const Operator OPERATORS[] = {
    {FUNCTIONS, "SparseLinear", 6, {FLOAT, FLOAT, UINT8, UINT8, INT32, FLOAT}},
    {FUNCTIONS, "TwoOfFourLinear", 4, {FLOAT, FLOAT, UINT32, FLOAT}},
};

/* ONNX Runtime calls this for SessionOptions.register_custom_ops_library; NULL is success. */
void *RegisterCustomOps(void *options, const ApiBase *base)
{
    const Api *api = base->get_api(17);
    void *domain = NULL, *status = CALL(api, CREATE_DOMAIN, "pst", &domain);
    for (size_t i = 0; i < sizeof OPERATORS / sizeof *OPERATORS && status == NULL; i++)
        status = CALL(api, ADD_TO_DOMAIN, domain, &OPERATORS[i]);
    if (status == NULL)
        status = CALL(api, ADD_DOMAIN, options, domain);
    return status;
}
