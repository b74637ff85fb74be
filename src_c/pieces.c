/* The pieces of a plan. */
#include "pieces.h"
#include "debug.h"

#include <stddef.h>

static void *element(const fbn_tensor *tensor, int64_t bytes, int64_t n, int64_t c, int64_t s) {
    return tensor->data ? tensor->data + (n * tensor->n + c * tensor->c + s * tensor->s) * bytes : NULL;
}

/* A piece that begins at sample n, channel c, position s, its rows `step` samples (along_n) or positions of a plane apart; what is not set
 * here is 0. Set field by field: returning or assigning a whole fbn_piece copies it, which costs time where planes are short. */
static void begin_piece(fbn_piece *piece, const fbn_plan *plan, int64_t n, int64_t c, int64_t s, int along_n, int64_t step) {
    const fbn_job *job = plan->job;
    const int64_t bytes = plan->element_bytes;
    piece->rows = piece->cols = piece->period = piece->prefetch = piece->dy_prefetch = piece->rows_ahead = 0;
    piece->out = element(&job->out, bytes, n, c, s);
    piece->dresidual = element(&job->dresidual, bytes, n, c, s);
    piece->sum = piece->dot = NULL;
    piece->row_offsets = NULL;
    piece->dy = element(&job->dy, bytes, n, c, s);
    piece->x = element(&job->x, bytes, n, c, s);
    piece->residual = element(&job->residual, bytes, n, c, s);
    piece->out_stride = step * (along_n ? job->out.n : job->out.s);
    piece->dresidual_stride = step * (along_n ? job->dresidual.n : job->dresidual.s);
    piece->dy_stride = step * (along_n ? job->dy.n : job->dy.s);
    piece->x_stride = step * (along_n ? job->x.n : job->x.s);
    piece->residual_stride = step * (along_n ? job->residual.n : job->residual.s);
    piece->activation = job->activation;
    piece->frozen = job->frozen;
    piece->short_planes = job->S < FBN_SHORT_PLANE;
    piece->short_rows = plan->short_rows;
    piece->in_core = plan->in_core;
    piece->outgrows = plan->outgrows;
    piece->stream = plan->stream;
}

/* A piece of samples, which channels last has in n and s, and channels first in n alone. */
static void begin_at_sample(fbn_piece *piece, const fbn_plan *plan, int64_t sample, int64_t c, int64_t step) {
    const int64_t S = plan->job->S;
    const int along_n = plan->memory.span == S;
    begin_piece(piece, plan, along_n ? sample : sample / S, c, along_n ? 0 : sample % S, along_n, step);
}

/* The constants of a piece, from value `index` of each table on. */
static void set_constants(fbn_piece *piece, const fbn_plan *plan, char *const *tables, int64_t index) {
    const int64_t offset = index * plan->constant_bytes;
    piece->center = tables[FBN_CENTER] + offset;
    piece->scale = tables[FBN_SCALE] + offset;
    piece->shift = tables[FBN_SHIFT] + offset;
    piece->slope = tables[FBN_SLOPE] + offset;
    piece->offset = tables[FBN_OFFSET] + offset;
}

void fbn_piece_of_planes(fbn_piece *piece, const fbn_plan *plan, int64_t c, int64_t channels, int64_t tile) {
    const fbn_job *job = plan->job;
    const int64_t tile_rows = plan->reduction.tile_rows, tiles = plan->reduction.tiles;
    FBN_ASSERT(c >= 0 && channels >= 1 && c + channels <= job->C && tile >= 0 && tile < tiles);
    int64_t n = tile * tile_rows, s = 0, rows = job->N - n < tile_rows ? job->N - n : tile_rows, cols = job->S;
    if (job->S > FBN_PLANE_TILE) {
        const int64_t parts = tiles / job->N;
        n = tile / parts;
        s = tile % parts * FBN_PLANE_TILE;
        rows = 1;
        cols = job->S - s < FBN_PLANE_TILE ? job->S - s : FBN_PLANE_TILE;
    }
    begin_piece(piece, plan, n, c, s, 1, 1);
    set_constants(piece, plan, plan->scratch.constants, c);
    piece->rows = rows;
    piece->cols = channels * cols;
    piece->period = cols;
    piece->sum = plan->scratch.sums + 2 * tile * job->C + c;
    piece->dot = piece->sum + job->C;
    /* The next group follows in memory; several threads have small groups in turn, others may be of another thread. */
    if (plan->stream && plan->memory.adjacent && (plan->threads == 1 || plan->reduction.in_first) && cols == job->S)
        piece->prefetch = plan->reduction.group_channels * cols;
}

void fbn_prefetch_planes(fbn_piece *piece, const fbn_plan *plan) {
    const fbn_reduction_plan *reduction = &plan->reduction;
    piece->rows_ahead = reduction->rows_ahead;
    piece->prefetch = reduction->rows_ahead ? reduction->rows_ahead * piece->x_stride : reduction->prefetch;
    piece->dy_prefetch = reduction->rows_ahead ? reduction->rows_ahead * piece->dy_stride : reduction->prefetch;
}

void fbn_piece_of_rows(fbn_piece *piece, const fbn_plan *plan, const int64_t *offsets, int64_t count, int64_t c, int64_t channels) {
    FBN_ASSERT(plan->job->x.c == 1 && c >= 0 && channels >= 1 && c + channels <= plan->job->C && count >= 1);
    begin_piece(piece, plan, 0, c, 0, 1, 1);
    set_constants(piece, plan, plan->scratch.constants, c);
    piece->rows = count;
    piece->cols = channels;
    piece->row_offsets = offsets;
    piece->sum = plan->scratch.sums + c;
    piece->dot = piece->sum + plan->job->C;
}

int64_t fbn_tile_samples(const fbn_plan *plan, int64_t tile, int64_t *count) {
    const fbn_reduction_plan *reduction = &plan->reduction;
    const int64_t rows = reduction->full_rows, tile_rows = reduction->tile_rows, tiles = (rows + tile_rows - 1) / tile_rows;
    FBN_ASSERT(tile >= 0 && tile < reduction->tiles);
    if (reduction->left_over && tile == reduction->tiles - 1) {
        *count = reduction->left_over;
        return rows * reduction->row_samples;
    }
    const int64_t row = tile % tiles * tile_rows;
    *count = (rows - row < tile_rows ? rows - row : tile_rows) * reduction->row_samples;
    return tile / tiles * plan->memory.samples + row * reduction->row_samples;
}

void fbn_piece_of_columns(fbn_piece *piece, const fbn_plan *plan, int64_t sample, int64_t count, int64_t row_samples, int64_t c,
                          int64_t channels) {
    FBN_ASSERT(c >= 0 && channels >= 1 && c + channels <= plan->job->C && row_samples >= 1 && count % row_samples == 0);
    begin_at_sample(piece, plan, sample, c, row_samples);
    set_constants(piece, plan, plan->scratch.constants, c);
    piece->rows = count / row_samples;
    piece->cols = row_samples * channels * plan->memory.span;
    piece->prefetch = plan->reduction.prefetch;
    piece->outgrows = plan->reduction.outgrows;
}

void fbn_piece_of_map(fbn_piece *piece, const fbn_plan *plan, int64_t sample, int64_t count, int64_t c, int64_t channels, int64_t s,
                      int64_t cols) {
    const int by_columns = plan->map.layout == FBN_NSC;
    FBN_ASSERT(count >= 1 && c >= 0 && channels >= 1 && c + channels <= plan->job->C);
    if (by_columns)
        begin_at_sample(piece, plan, sample, c, 1);
    else
        begin_piece(piece, plan, sample, c, s, 1, 1);
    piece->rows = count;
    piece->cols = channels * cols;
    if (!by_columns) {
        set_constants(piece, plan, plan->scratch.constants, c);
        piece->period = cols;
        piece->prefetch = plan->map.group_ahead ? channels * cols : 0;
        return;
    }
    FBN_ASSERT(c == 0 && channels == plan->job->C);
    set_constants(piece, plan, plan->scratch.tables, 0);
    piece->period = plan->map.period;
    if (!plan->memory.contiguous) {
        /* Rows apart may begin and end with parts of lines. docs/numerics.md: streaming stores. */
        const uint64_t places = (uint64_t)(uintptr_t)piece->out | (uint64_t)((piece->cols | piece->out_stride) * plan->element_bytes);
        piece->stream &= places % 64 == 0;
        return;
    }
    piece->rows = 1;
    piece->cols *= count;
}
