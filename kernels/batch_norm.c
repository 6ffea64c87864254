/* Batch normalization of fp32 images whose channels lie innermost, for the cpu target.

batch_norm_forward   the statistics, and y = relu(normalised x + residual), as much as is asked for
batch_norm_backward  the gradient g behind the relu, and those of x, weight and bias

Each passes over the image twice, and reads and writes 4 images forward and 8 backward. torch has
one kernel for each operation, which makes that 8 and 13, and adds up a channel in one fp32 sum,
which is 1e-5 off.

The image is a matrix of pixels by channels. Neighbouring pixels are joined into rows, so that the
width of a row is a multiple of LANES, if that takes at most WIDEST values; else a row is one pixel.
Value j of a row belongs to channel j % channels. Sums run down the rows, lane by lane: in fp32 over
the few rows of a block, in float64 from there on.

Rows are cut into parts for the threads. The cut depends on the shape alone, and the sums of the
parts are joined in order, so the bits do not depend on the number of threads. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LANES 64      /* values side by side: four vectors of AVX-512, which stay in registers */
#define TERMS 32      /* rows of a block: an fp32 sum has no more terms */
#define WIDE 1024     /* values of a row from which on ... */
#define WIDE_TERMS 8  /* ... a block has fewer rows: they share few lines of the first cache */
#define WIDEST 2048   /* values of a row that is made of several pixels */
#define PART 65536    /* values of a part */
#define MOST_PARTS 64
#define SUMS 3        /* that a part keeps for each lane: two forward, three backward */

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    long width, rows, left, parts; /* `left` values stand behind the last whole row */
} Grid;

static Grid grid_of(long channels, long pixels)
{
    long together = 1;
    while (together * channels % LANES && together < LANES)
        together *= 2;
    if (together * channels > WIDEST)
        together = 1;
    Grid g = {.width = together * channels, .rows = pixels / together};
    g.left = pixels % together * channels;
    g.parts = pixels * channels / PART;
    if (g.parts > g.rows / TERMS)
        g.parts = g.rows / TERMS;
    if (g.parts > MOST_PARTS)
        g.parts = MOST_PARTS;
    if (g.parts < 1)
        g.parts = 1;
    return g;
}

static long terms_of(Grid g) { return g.width < WIDE ? TERMS : WIDE_TERMS; }

/* The first row of a part; first_of(g, g.parts) is the end of the last one. */
static long first_of(Grid g, long part) { return g.rows * part / g.parts; }

/* Where the values of a part end; the last one has those behind the last whole row, too. */
static long end_of(Grid g, long part)
{
    return first_of(g, part + 1) * g.width + (part == g.parts - 1 ? g.left : 0);
}

/* A vector over the channels, repeated for each pixel of a row. They must not overlap. */
static void spread(float *row, const float *vector, long channels, long width)
{
    for (long j = 0; j < width; j += channels)
        memcpy(row + j, vector, channels * sizeof(float));
}

/* Memory for the sums of all parts and four rows behind them, or NULL. */
static double *workspace(Grid g)
{
    return calloc(SUMS * g.parts * g.width * sizeof(double) + 4 * g.width * sizeof(float), 1);
}

static double *sums_in(double *space, Grid g, long part) { return space + SUMS * part * g.width; }

static float *rows_in(double *space, Grid g) { return (float *)sums_in(space, g, g.parts); }

/* One of the SUMS over all lanes and parts of a channel. */
static double joined(double *space, Grid g, long channels, long channel, int which)
{
    double sum = 0;
    for (long p = 0; p < g.parts; p++)
        for (long j = channel; j < g.width; j += channels)
            sum += sums_in(space, g, p)[which * g.width + j];
    return sum;
}

/* ---- the sums of the forward pass --------------------------------------------------------- */

/* Adds to each lane the sum of its values and that of their squares, both relative to `origin`,
the channel's first value, so that nothing is lost where a mean is large. Squares are taken about
the mean of the block, and s corrects for the rounding of that mean: the corrected two-pass
algorithm of Chan, Golub and LeVeque (1983). */
INLINE void block_moments(const float *x, const float *origin, long width, long rows, long lanes,
                          double *sum, double *squares)
{
    float mean[LANES] = {0}, s[LANES] = {0}, q[LANES] = {0};
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < lanes; j++)
            mean[j] += x[r * width + j];
    for (long j = 0; j < lanes; j++)
        mean[j] /= rows;
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < lanes; j++) {
            float d = x[r * width + j] - mean[j];
            s[j] += d;
            q[j] += d * d;
        }
    for (long j = 0; j < lanes; j++) {
        double total = ((double)mean[j] - origin[j]) * rows + s[j];
        sum[j] += total;
        squares[j] += q[j] - (double)s[j] * s[j] / rows + total * total / rows;
    }
}

static void moments(const float *x, const float *origin, long width, long rows, long terms,
                    double *sum, double *squares)
{
    for (long r = 0; r < rows; r += terms) {
        long n = rows - r < terms ? rows - r : terms, j = 0;
        const float *at = x + r * width;
        for (; j + LANES <= width; j += LANES)
            block_moments(at + j, origin + j, width, n, LANES, sum + j, squares + j);
        if (j < width)
            block_moments(at + j, origin + j, width, n, width - j, sum + j, squares + j);
    }
}

/* ---- the sums of the backward pass -------------------------------------------------------- */

/* What the backward pass reads and writes; `more`, `y` and `g` may be missing. */
typedef struct {
    const float *dy, *more, *y, *x;
    float *g;
} Operands;

static Operands moved(Operands o, long values)
{
    return (Operands){o.dy + values, o.more ? o.more + values : NULL, o.y ? o.y + values : NULL,
                      o.x + values, o.g ? o.g + values : NULL};
}

/* g = dy + more where y > 0. A NaN in y lets it pass, as in torch. */
INLINE float masked(Operands o, long j, int more, int relu)
{
    float g = o.dy[j];
    if (more)
        g += o.more[j];
    return relu && o.y[j] <= 0 ? 0 : g;
}

/* Adds to each lane the sums of g, of g (x - mean) and of x - mean; writes g where it is not dy.
The mean is rounded to fp32, so that x - mean does not add up to zero. The third sum says by how
much, and corrects the second. */
INLINE void block_sums(Operands o, const float *mean, long width, long rows, long lanes, int more,
                       int relu, double *total, long apart)
{
    float s[LANES] = {0}, q[LANES] = {0}, off[LANES] = {0};
    for (long r = 0; r < rows; r++, o = moved(o, width)) {
        /* g may lie where dy or more lies: a lane reads before it writes, and no other lane. */
#pragma omp simd
        for (long j = 0; j < lanes; j++) {
            float g = masked(o, j, more, relu), d = o.x[j] - mean[j];
            if (more || relu)
                o.g[j] = g;
            s[j] += g;
            q[j] += g * d;
            off[j] += d;
        }
    }
    for (long j = 0; j < lanes; j++) {
        total[j] += s[j];
        total[apart + j] += q[j];
        total[2 * apart + j] += off[j];
    }
}

INLINE void sums_of(Operands o, const float *mean, long width, long rows, long terms, int more,
                    int relu, double *total, long apart)
{
    for (long r = 0; r < rows; r += terms) {
        long n = rows - r < terms ? rows - r : terms, j = 0;
        Operands block = moved(o, r * width);
        for (; j + LANES <= width; j += LANES)
            block_sums(moved(block, j), mean + j, width, n, LANES, more, relu, total + j, apart);
        if (j < width)
            block_sums(moved(block, j), mean + j, width, n, width - j, more, relu, total + j,
                       apart);
    }
}

/* One loop for each of the four cases, so that none of them asks inside of it. */
static void sums(Operands o, const float *mean, long width, long rows, long terms, double *total,
                 long apart)
{
    if (o.more && o.y)
        sums_of(o, mean, width, rows, terms, 1, 1, total, apart);
    else if (o.more)
        sums_of(o, mean, width, rows, terms, 1, 0, total, apart);
    else if (o.y)
        sums_of(o, mean, width, rows, terms, 0, 1, total, apart);
    else
        sums_of(o, mean, width, rows, terms, 0, 0, total, apart);
}

/* ---- values ------------------------------------------------------------------------------- */

INLINE void normalise_row(const float *x, const float *residual, float *y, const float *mean,
                          const float *factor, const float *shift, long width, int add, int relu)
{
#pragma omp simd
    for (long j = 0; j < width; j++) {
        float v = (x[j] - mean[j]) * factor[j] + shift[j];
        if (add)
            v += residual[j];
        y[j] = relu && v < 0 ? 0 : v; /* NaN stays */
    }
}

static void normalise(const float *x, const float *residual, float *y, const float *mean,
                      const float *factor, const float *shift, long width, int relu)
{
    if (residual && relu)
        normalise_row(x, residual, y, mean, factor, shift, width, 1, 1);
    else if (residual)
        normalise_row(x, residual, y, mean, factor, shift, width, 1, 0);
    else if (relu)
        normalise_row(x, residual, y, mean, factor, shift, width, 0, 1);
    else
        normalise_row(x, residual, y, mean, factor, shift, width, 0, 0);
}

static void gradient_row(const float *g, const float *x, float *dx, const float *mean,
                         const float *a, const float *b, const float *c, long width)
{
#pragma omp simd
    for (long j = 0; j < width; j++)
        dx[j] = g[j] * a[j] + (x[j] - mean[j]) * b[j] + c[j];
}

/* ---- what is called ------------------------------------------------------------------------ */

/* x, residual, y  [pixels, channels]; residual may be NULL
live             the first pixels, at least one, make up the statistics; all are normalised
weight, bias     [channels], or NULL
mean, var        of the batch, var biased; that in new_var is unbiased
momentum         the share of the batch in new_mean and new_var, which may be NULL
Returns 0, or 1 where there is no memory. */
int batch_norm_forward(long channels, long pixels, long live, const float *x, const float *weight,
                       const float *bias, double eps, const float *residual, int relu, float *y,
                       float *mean, float *var, const float *old_mean, const float *old_var,
                       double momentum, float *new_mean, float *new_var, int threads)
{
    Grid g = grid_of(channels, live);
    double *space = workspace(g);
    if (!space)
        return 1;
    float *origin = rows_in(space, g), *mean_row = origin + g.width;
    float *factor_row = mean_row + g.width, *shift_row = factor_row + g.width;
    spread(origin, x, channels, g.width);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < g.parts; p++) {
        double *sum = sums_in(space, g, p), *squares = sum + g.width;
        long first = first_of(g, p), end = first_of(g, p + 1);
        moments(x + first * g.width, origin, g.width, end - first, terms_of(g), sum, squares);
        if (g.left && p == g.parts - 1)
            moments(x + end * g.width, origin, g.left, 1, 1, sum, squares);
    }
    for (long c = 0; c < channels; c++) {
        double sum = joined(space, g, channels, c, 0), exact_mean = origin[c] + sum / live;
        double biased = (joined(space, g, channels, c, 1) - sum / live * sum) / live;
        if (biased < 0) /* by rounding, where all values are alike */
            biased = 0;
        mean[c] = exact_mean;
        var[c] = biased;
        if (new_mean) {
            double unbiased = biased * (live / (live > 1 ? live - 1.0 : 1.0));
            new_mean[c] = old_mean[c] + momentum * (exact_mean - old_mean[c]);
            new_var[c] = old_var[c] + momentum * (unbiased - old_var[c]);
        }
        double factor = (weight ? weight[c] : 1.0) / sqrt(biased + eps);
        double shift = (bias ? bias[c] : 0.0) - (exact_mean - mean[c]) * factor;
        for (long j = c; j < g.width; j += channels) {
            mean_row[j] = mean[c];
            factor_row[j] = factor;
            shift_row[j] = shift;
        }
    }
    Grid all = grid_of(channels, pixels);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < all.parts; p++) {
        long end = end_of(all, p);
        for (long at = first_of(all, p) * all.width; at < end; at += all.width)
            normalise(x + at, residual ? residual + at : NULL, y + at, mean_row, factor_row,
                      shift_row, end - at < all.width ? end - at : all.width, relu);
    }
    free(space);
    return 0;
}

/* With g = dy + more where y > 0, M = live and xhat = (x - mean) rstd:
dbias = sum g, dweight = sum g xhat, dx = weight rstd (g - dbias / M - xhat dweight / M).

dy, more, y, x, g, dx  [pixels, channels]. Without `more` there is one term, without y no relu;
                       without both g is dy, and is not written. g may be dy or more, and dx may be
                       dy, more, g or x. dx may be NULL
live                   the first pixels, at least one; dx of the others is zero
Returns 0, or 1 where there is no memory. */
int batch_norm_backward(long channels, long pixels, long live, const float *dy, const float *more,
                        const float *y, const float *x, const float *mean, const float *var,
                        double eps, const float *weight, float *g, float *dx, float *dweight,
                        float *dbias, int threads)
{
    Grid grid = grid_of(channels, live);
    double *space = workspace(grid);
    if (!space)
        return 1;
    Operands image = {dy, more, y, x, g};
    float *mean_row = rows_in(space, grid), *a = mean_row + grid.width, *b = a + grid.width;
    float *c = b + grid.width;
    spread(mean_row, mean, channels, grid.width);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < grid.parts; p++) {
        double *total = sums_in(space, grid, p);
        long first = first_of(grid, p), end = first_of(grid, p + 1);
        sums(moved(image, first * grid.width), mean_row, grid.width, end - first, terms_of(grid),
             total, grid.width);
        if (grid.left && p == grid.parts - 1)
            sums(moved(image, end * grid.width), mean_row, grid.left, 1, 1, total, grid.width);
    }
    if ((more || y) && live < pixels) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long j = live * channels; j < pixels * channels; j++)
            g[j] = masked(image, j, more != NULL, y != NULL);
    }
    for (long j = 0; j < channels; j++) {
        double rstd = 1 / sqrt(var[j] + eps), scale = rstd * (weight ? weight[j] : 1.0);
        double db = joined(space, grid, channels, j, 0);
        double off = joined(space, grid, channels, j, 2) / live;
        double dw = (joined(space, grid, channels, j, 1) - off * db) * rstd;
        dbias[j] = db;
        dweight[j] = dw;
        for (long k = j; k < grid.width; k += channels) {
            a[k] = scale;
            b[k] = -scale * rstd * dw / live;
            c[k] = -scale * (db - off * rstd * dw) / live;
        }
    }
    const float *grad = more || y ? g : dy;
    if (dx) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long p = 0; p < grid.parts; p++) {
            long end = end_of(grid, p);
            for (long at = first_of(grid, p) * grid.width; at < end; at += grid.width)
                gradient_row(grad + at, x + at, dx + at, mean_row, a, b, c,
                             end - at < grid.width ? end - at : grid.width);
        }
        memset(dx + live * channels, 0, (pixels - live) * channels * sizeof(float));
    }
    free(space);
    return 0;
}
