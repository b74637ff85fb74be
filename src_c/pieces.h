/* The pieces of a plan: which elements of the tensors, with which constants, one call of a kernel is given. Private to src_c. */
#ifndef FASTBN_PIECES_H
#define FASTBN_PIECES_H

#include "plan.h"

/* By planes: tile `tile` of channel c and, in a map, of the channels behind it that lie side by side. */
void fbn_piece_of_planes(fbn_piece *piece, const fbn_plan *plan, int64_t c, int64_t channels, int64_t tile);
/* Sets what a reduction of such a piece prefetches. */
void fbn_prefetch_planes(fbn_piece *piece, const fbn_plan *plan);

/* `count` rows, at offsets in elements, of channels that lie side by side, from channel c on; its sums go where those of the first tile
 * will be. */
void fbn_piece_of_rows(fbn_piece *piece, const fbn_plan *plan, const int64_t *offsets, int64_t count, int64_t c, int64_t channels);

/* Reduction by columns: the first sample of a tile and, in *count, how many it has. */
int64_t fbn_tile_samples(const fbn_plan *plan, int64_t tile, int64_t *count);
/* Its piece for the channels from c on: `count` samples in rows of `row_samples`, without the places for its sums. */
void fbn_piece_of_columns(fbn_piece *piece, const fbn_plan *plan, int64_t sample, int64_t count, int64_t row_samples, int64_t c,
                          int64_t channels);

/* Map: `count` samples of neighboring channels, whole, or a part of the planes of one channel, `cols` elements from position s on. */
void fbn_piece_of_map(fbn_piece *piece, const fbn_plan *plan, int64_t sample, int64_t count, int64_t c, int64_t channels, int64_t s,
                      int64_t cols);

#endif
