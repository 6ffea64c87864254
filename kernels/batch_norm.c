/* Batch normalization of fp32 images whose channels lie innermost, for the cpu target.

batch_norm_forward   statistics, y with what is added to it and its relu, and the running statistics
batch_norm_backward  the relu's gradient g, from one or two terms, and the gradients behind it

Both pass over the image twice. torch's kernels take five to nine passes for the same, one for each
operation, and add up a channel in one fp32 sum that is 1e-5 off.

An image is read as rows of `width` values: as many pixels as fill whole blocks of LANES neighbouring
values. Value j of every row belongs to channel j % channels. A block of TERMS rows is added up in
fp32, lane by lane, and all that follows is in float64. The image is cut into parts by its size
alone, and their sums are joined in the order of the parts: the bits do not depend on the number of
threads. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LANES 64      /* four vectors of AVX-512: they stay in registers */
#define TERMS 32      /* what an fp32 sum has at the most */
#define WIDEST 2048   /* values of a row that is made of several pixels */
#define PART 65536    /* values of a part */
#define MOST_PARTS 64
#define KINDS 3          /* sums of a part and lane */

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
    if (g.parts < 1)
        g.parts = 1;
    if (g.parts > MOST_PARTS)
        g.parts = MOST_PARTS;
    return g;
}

/* The first row of a part; of part `parts` where the last one ends. */
static long first_of(Grid g, long part) { return g.rows * part / g.parts; }

/* A vector over the channels, once for each pixel of a row. */
static void spread(float *row, const float *vector, long channels, long width)
{
    for (long j = 0; j < width; j += channels)
        memcpy(row + j, vector, channels * sizeof(float));
}

/* ---- sums -------------------------------------------------------------------------------- */

/* Adds to each lane the sum of its values and the sum of their squares, both relative to the
channel's first value, so that nothing is lost where a mean is large. Within the block squares are
taken about its mean, and s corrects for the rounding of that mean (the corrected two-pass
algorithm of Chan, Golub and LeVeque 1983). */
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

static void moments(const float *x, const float *origin, long width, long rows, double *sum, double *squares)
{
    for (long r = 0; r < rows; r += TERMS) {
        long n = rows - r < TERMS ? rows - r : TERMS, j = 0;
        const float *at = x + r * width;
        for (; j + LANES <= width; j += LANES)
            block_moments(at + j, origin + j, width, n, LANES, sum + j, squares + j);
        if (j < width)
            block_moments(at + j, origin + j, width, n, width - j, sum + j, squares + j);
    }
}

/* What the backward pass reads and writes; `more` and `y` may be missing. */
typedef struct {
    const float *dy, *more, *y, *x;
    float *g;
} Gradient;

static Gradient behind(Gradient at, long values)
{
    return (Gradient){at.dy + values, at.more ? at.more + values : NULL,
                      at.y ? at.y + values : NULL, at.x + values, at.g ? at.g + values : NULL};
}

/* g = dy + more where y > 0: a NaN in y passes it, as in torch's relu. */
INLINE float masked(Gradient at, long j, int more, int relu)
{
    float g = at.dy[j];
    if (more)
        g += at.more[j];
    return relu && at.y[j] <= 0 ? 0 : g;
}

/* Adds to each lane the sums of g, of g (x - mean) and of x - mean, `apart` lanes apart; g is written
where it is new. The third one is what the fp32 mean is off: 1e-7 of it, times the sum of g, would
count beside the second. */
INLINE void block_sums(Gradient at, const float *mean, long width, long rows, long lanes, int more,
                       int relu, double *total, long apart)
{
    float s[LANES] = {0}, q[LANES] = {0}, off[LANES] = {0};
    for (long r = 0; r < rows; r++, at = behind(at, width)) {
        /* g may lie where dy lies: every lane reads before it writes, and reads no other lane. */
#pragma omp simd
        for (long j = 0; j < lanes; j++) {
            float g = masked(at, j, more, relu);
            if (more || relu)
                at.g[j] = g;
            float d = at.x[j] - mean[j];
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

INLINE void sums_of(Gradient at, const float *mean, long width, long rows, int more, int relu,
                    double *total, long apart)
{
    for (long r = 0; r < rows; r += TERMS) {
        long n = rows - r < TERMS ? rows - r : TERMS, j = 0;
        Gradient first = behind(at, r * width);
        for (; j + LANES <= width; j += LANES)
            block_sums(behind(first, j), mean + j, width, n, LANES, more, relu, total + j,
                       apart);
        if (j < width)
            block_sums(behind(first, j), mean + j, width, n, width - j, more, relu, total + j,
                       apart);
    }
}

/* One loop for each of the four cases, so that none asks inside of it. */
static void sums(Gradient at, const float *mean, long width, long rows, double *total, long apart)
{
    if (at.more && at.y)
        sums_of(at, mean, width, rows, 1, 1, total, apart);
    else if (at.more)
        sums_of(at, mean, width, rows, 1, 0, total, apart);
    else if (at.y)
        sums_of(at, mean, width, rows, 0, 1, total, apart);
    else
        sums_of(at, mean, width, rows, 0, 0, total, apart);
}

/* The sum of one channel over all parts, of the `kind` that a part holds there. */
static double joined(const double *totals, Grid g, long channels, long channel, int kind)
{
    double sum = 0;
    for (long p = 0; p < g.parts; p++)
        for (long j = channel; j < g.width; j += channels)
            sum += totals[(KINDS * p + kind) * g.width + j];
    return sum;
}

/* ---- values ------------------------------------------------------------------------------- */

INLINE void normalise_row(const float *x, const float *residual, float *y, const float *mean,
                          const float *factor, const float *bias, long width, int add, int relu)
{
#pragma omp simd
    for (long j = 0; j < width; j++) {
        float v = (x[j] - mean[j]) * factor[j] + bias[j];
        if (add)
            v += residual[j];
        y[j] = relu && v < 0 ? 0 : v; /* NaN stays */
    }
}

static void normalise(const float *x, const float *residual, float *y, const float *mean,
                      const float *factor, const float *bias, long width, int relu)
{
    if (residual && relu)
        normalise_row(x, residual, y, mean, factor, bias, width, 1, 1);
    else if (residual)
        normalise_row(x, residual, y, mean, factor, bias, width, 1, 0);
    else if (relu)
        normalise_row(x, residual, y, mean, factor, bias, width, 0, 1);
    else
        normalise_row(x, residual, y, mean, factor, bias, width, 0, 0);
}

static void gradient_row(const float *g, const float *x, float *dx, const float *mean,
                         const float *a, const float *b, const float *c, long width)
{
#pragma omp simd
    for (long j = 0; j < width; j++)
        dx[j] = g[j] * a[j] + (x[j] - mean[j]) * b[j] + c[j];
}

/* ---- what is called ------------------------------------------------------------------------ */

/* Memory for both passes, or NULL: KINDS sums a part and lane, and four vectors of a row. */
static double *workspace(Grid g)
{
    return calloc(KINDS * g.parts * g.width * sizeof(double) + 4 * g.width * sizeof(float), 1);
}

static float *vectors_in(double *space, Grid g) { return (float *)(space + KINDS * g.parts * g.width); }

/* x, residual, y  [pixels, channels]; residual may be NULL, and y may be residual
live             the first pixels, at least one: they make up the statistics
weight, bias     [channels], or both NULL
share            of the new statistics in the running ones, where new_mean is not NULL
mean, var        of the batch, var biased; the running one is unbiased
Returns 0, or 1 where there is no memory. */
int batch_norm_forward(long channels, long pixels, long live, const float *x, const float *weight,
                       const float *bias, double eps, const float *residual, int relu, float *y,
                       float *mean, float *var, const float *old_mean, const float *old_var,
                       double share, float *new_mean, float *new_var, int threads)
{
    Grid g = grid_of(channels, live);
    double *totals = workspace(g);
    if (!totals)
        return 1;
    float *centre = vectors_in(totals, g), *factor = centre + g.width, *shift = factor + g.width;
    float *row = shift + g.width;
    spread(row, x, channels, g.width); /* the first value of each channel */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < g.parts; p++) {
        double *sum = totals + KINDS * p * g.width, *squares = sum + g.width;
        long first = first_of(g, p), end = first_of(g, p + 1);
        moments(x + first * g.width, row, g.width, end - first, sum, squares);
        if (g.left && p == g.parts - 1)
            moments(x + end * g.width, row, g.left, 1, sum, squares);
    }
    for (long c = 0; c < channels; c++) {
        double total = joined(totals, g, channels, c, 0), middle = x[c] + total / live;
        double biased = (joined(totals, g, channels, c, 1) - total / live * total) / live;
        if (biased < 0) /* rounding, where all values are alike */
            biased = 0;
        mean[c] = middle;
        var[c] = biased;
        if (new_mean) {
            double unbiased = biased * (live / (live > 1 ? live - 1.0 : 1.0));
            new_mean[c] = old_mean[c] + share * (middle - old_mean[c]);
            new_var[c] = old_var[c] + share * (unbiased - old_var[c]);
        }
        double scale = (weight ? weight[c] : 1.0) / sqrt(biased + eps);
        factor[c] = scale;
        shift[c] = (bias ? bias[c] : 0.0) - (middle - mean[c]) * scale; /* what mean[c] rounds off */
    }
    memcpy(row, factor, channels * sizeof(float));
    spread(factor, row, channels, g.width);
    memcpy(row, shift, channels * sizeof(float));
    spread(shift, row, channels, g.width);
    spread(centre, mean, channels, g.width);
    Grid all = grid_of(channels, pixels); /* rows that are not live are normalised, too */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < all.parts; p++) {
        long end = first_of(all, p + 1);
        for (long r = first_of(all, p); r < end; r++) {
            long at = r * all.width;
            normalise(x + at, residual ? residual + at : NULL, y + at, centre, factor, shift,
                      all.width, relu);
        }
        if (all.left && p == all.parts - 1) {
            long at = end * all.width;
            normalise(x + at, residual ? residual + at : NULL, y + at, centre, factor, shift,
                      all.left, relu);
        }
    }
    free(totals);
    return 0;
}

/* With g = dy + more where y > 0, M = live and xhat = (x - mean) rstd:
dbias = sum g, dweight = sum g xhat, dx = weight rstd (g - dbias / M - xhat dweight / M).

dy, more, y, x, g, dx  [pixels, channels]; without more, g needs no add, without y, no relu. Where
                       both are missing g is dy and not written. g may be dy or more, dx any of
                       dy, more, g and x
live                   the first pixels, at least one: dx of the others is zero
dx, dweight, dbias     may be NULL
Returns 0, or 1 where there is no memory. */
int batch_norm_backward(long channels, long pixels, long live, const float *dy, const float *more,
                        const float *y, const float *x, const float *mean, const float *var,
                        double eps, const float *weight, float *g, float *dx, float *dweight,
                        float *dbias, int threads)
{
    Grid grid = grid_of(channels, live);
    double *totals = workspace(grid);
    if (!totals)
        return 1;
    Gradient image = {dy, more, y, x, g};
    float *centre = vectors_in(totals, grid), *a = centre + grid.width, *b = a + grid.width;
    float *c = b + grid.width;
    spread(centre, mean, channels, grid.width);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < grid.parts; p++) {
        double *total = totals + KINDS * p * grid.width;
        long first = first_of(grid, p), end = first_of(grid, p + 1);
        sums(behind(image, first * grid.width), centre, grid.width, end - first, total,
             grid.width);
        if (grid.left && p == grid.parts - 1)
            sums(behind(image, end * grid.width), centre, grid.left, 1, total, grid.width);
    }
    if (more || y)
        for (long j = live * channels; j < pixels * channels; j++)
            g[j] = masked(image, j, more != NULL, y != NULL);
    for (long j = 0; j < channels; j++) {
        double rstd = 1 / sqrt(var[j] + eps), scale = rstd * (weight ? weight[j] : 1.0);
        double db = joined(totals, grid, channels, j, 0);
        double off = joined(totals, grid, channels, j, 2) / live;
        double dw = (joined(totals, grid, channels, j, 1) - off * db) * rstd;
        if (dbias)
            dbias[j] = db;
        if (dweight)
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
            long end = first_of(grid, p + 1) * grid.width, n = grid.width;
            for (long at = first_of(grid, p) * n; at < end; at += n)
                gradient_row(grad + at, x + at, dx + at, centre, a, b, c, n);
            if (grid.left && p == grid.parts - 1)
                gradient_row(grad + end, x + end, dx + end, centre, a, b, c, grid.left);
        }
        memset(dx + live * channels, 0, (pixels - live) * channels * sizeof(float));
    }
    free(totals);
    return 0;
}
