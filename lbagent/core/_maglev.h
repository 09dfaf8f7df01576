/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Weighted Maglev on a power of two: see ring.py for what it is, tests/reference.py for the plain version.
 *
 * Two tricks make it fast, and change no choice. Most of the time goes into probing slots that are taken, so members
 * are moved past those before their turn, several at once (look_ahead). And when few slots are free, those are
 * listed, and the first one in a member's sequence is computed instead of searched for (pick_free).
 */
#pragma once
#include "_words.h"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("avx2", "default")))	/* chosen when loaded */
#else
#define WIDE
#endif

#define NONE UINT32_MAX
#define MEMBERS_MAX (1U << 16)	/* a rank has 16 bits */

/*
 * A member visits the slots offset, offset + step, offset + 2 step, ... modulo 2^bits. Its state is one word: the
 * slot it asks for next in the top bits, the step (odd) in the top bits of the lower half. So the next slot is
 * word >> (64 - bits), and one more addition, which wraps by itself, leads to the one after it.
 */
static inline __u64 member_at(__u32 slot, __u32 step, unsigned int bits)
{
	return (__u64)slot << (64 - bits) | (__u64)step << (32 - bits);
}

static inline __u64 moved_on(__u64 member)
{
	return member + (member << 32);
}

/* What a member brings. Ranks follow keys; those of one key, unlikely as they are, follow who they are. */
struct entrant {
	__u64 key;		/* decides its rank, offset and step */
	__u64 name;		/* address and port */
	__u32 weight;
	__u32 number;		/* its place among the arguments, from 1 */
};

/* The members of one weight. They take their turns together, in the order of their ranks. */
struct class {
	__u64 due;		/* round of the next turn, 32.32 bits */
	__u64 spacing;		/* rounds between turns, 32.32 bits; 1 for the heaviest */
	__u64 remainder;	/* of the exact share in slots, in 1 / total weight */
	__u32 weight;
	__u32 first;		/* of `size` ranks in struct ring.ranks */
	__u32 size;
	__u32 turns;		/* that all still have */
	__u32 extra;		/* the first so many have one more */
	__u32 next;		/* class due in the same round */
};

struct ring {
	unsigned int bits;
	__u32 *table;		/* slot -> member's number, the result */
	__u16 *owner;		/* slot -> rank, half as big; once the free slots are listed, free slot -> index */
	__u64 *taken;		/* bit per slot: 32 KiB at most, which stay in the first-level cache */
	__u32 left;		/* free slots */
	__u32 tail;		/* once no more than so many are left, they are listed in free */
	__u32 *free;
	__u32 count;		/* of members with weight */
	struct entrant *entrants;	/* by rank */
	__u64 *members;		/* by rank: where it is in its sequence, see member_at() */
	__u32 *numbers;		/* by rank */
	__u32 *ranks;		/* by weight, heaviest first, then by rank */
	struct class *classes;	/* heaviest first */
	__u32 class_count;
	__u32 *by_round;	/* round -> first class due in it */
	__u32 last_round;
	__u32 *turn;		/* ranks whose turn it is */
	__u64 *due_ranks;	/* bit per rank */
};

static inline void probe(struct ring *ring, __u32 rank)
{
	__u64 member = ring->members[rank], step = member << 32;
	const __u64 *taken = ring->taken;
	unsigned int shift = 64 - ring->bits;
	__u32 slot;

	do {
		slot = member >> shift;
		member += step;
	} while (get_bit(taken, slot));
	ring->members[rank] = member;
	set_bit(ring->taken, slot);
	ring->owner[slot] = rank;
	ring->left--;
}

/*
 * Move members whose turn is near past slots that are taken already. That changes no choice, as no slot becomes
 * free again, and may be done for all of them at once: some streams, each with one member at a time, hide the
 * latency of the others, and nothing depends on a branch that cannot be predicted.
 */
#define STREAMS 4
#define BATCH 32	/* turns from which it pays */

static void look_ahead(struct ring *ring, __u32 turns)
{
	const __u64 *taken = ring->taken;
	const __u32 *turn = ring->turn;
	__u64 *members = ring->members, at[STREAMS];
	unsigned int shift = 64 - ring->bits;
	__u32 rank[STREAMS], next = STREAMS;

	for (int i = 0; i < STREAMS; i++) {
		rank[i] = turn[i];
		at[i] = members[rank[i]];
	}
	while (next < turns - STREAMS) {
#pragma GCC unroll 4
		for (int i = 0; i < STREAMS; i++) {
			__u64 stay = -(__u64)get_bit(taken, at[i] >> shift);
			__u32 other = turn[next];

			at[i] += at[i] << 32 & stay;
			members[rank[i]] = at[i];
			at[i] = (at[i] & stay) | (members[other] & ~stay);
			rank[i] = (rank[i] & stay) | (other & ~stay);
			next += 1 + stay;
		}
	}
}

WIDE static __u32 least(const __u32 *slots, __u32 count, __u32 factor, __u32 from)
{
	__u32 found = UINT32_MAX;

	for (__u32 i = 0; i < count; i++) {
		__u32 distance = slots[i] * factor - from;

		found = distance < found ? distance : found;
	}
	return found;
}

/*
 * The same choice when few slots are free: of them, the one that comes first in the member's sequence. Slot s is
 * (s - at) / step turns away, modulo 2^bits; an odd number has an inverse.
 */
static void pick_free(struct ring *ring, __u32 rank)
{
	__u64 member = ring->members[rank];
	unsigned int bits = ring->bits, shift = 32 - bits;
	__u32 at = member >> (64 - bits), step = (__u32)member >> shift, inverse = step, distance, slot, index, last;

	for (int i = 0; i < 4; i++)
		inverse *= 2 - step * inverse;	/* Newton: 3, 6, 12, 24, 48 bits are right */
	distance = least(ring->free, ring->left, inverse << shift, at * inverse << shift) >> shift;
	slot = (at + distance * step) & ((1U << bits) - 1);
	ring->members[rank] = moved_on(member_at(slot, step, bits));

	index = ring->owner[slot];
	last = ring->free[--ring->left];
	ring->free[index] = last;
	ring->owner[last] = index;
	ring->owner[slot] = rank;
}

static void list_free(struct ring *ring)
{
	__u32 found = 0;

	for (__u32 word = 0; word < ((1U << ring->bits) + 63) / 64; word++)
		for (__u64 free = ~ring->taken[word]; free; free &= free - 1) {
			__u32 slot = word * 64 + (__u32)__builtin_ctzll(free);

			ring->owner[slot] = found;
			ring->free[found++] = slot;
		}
}

static void take_turns(struct ring *ring, __u32 turns)
{
	__u32 i = 0;

	if (ring->left > ring->tail) {
		if (turns >= BATCH && ring->left > (1U << ring->bits) / 8)
			look_ahead(ring, turns);
		while (i < turns && ring->left > ring->tail)
			probe(ring, ring->turn[i++]);
		if (ring->left == ring->tail)
			list_free(ring);
	}
	while (i < turns)
		pick_free(ring, ring->turn[i++]);
}

static void sort_turns(struct ring *ring, __u32 turns)
{
	__u32 words = (ring->count + 63) / 64, sorted = 0;

	for (__u32 i = 0; i < turns; i++)
		set_bit(ring->due_ranks, ring->turn[i]);
	for (__u32 word = 0; word < words; word++) {
		for (__u64 due = ring->due_ranks[word]; due; due &= due - 1)
			ring->turn[sorted++] = word * 64 + (__u32)__builtin_ctzll(due);
		ring->due_ranks[word] = 0;
	}
}

static void schedule(struct ring *ring, __u32 number)
{
	struct class *class = &ring->classes[number];
	__u64 round = class->due >> 32;

	if (round > ring->last_round)
		round = ring->last_round;
	if (!class->turns && !class->extra)
		return;
	class->due += class->spacing;
	class->next = ring->by_round[round];
	ring->by_round[round] = number;
}

static void fill(struct ring *ring)
{
	for (__u32 number = 0; number < ring->class_count; number++)
		schedule(ring, number);
	/* Who still has turns after the last round takes them then, one after the other. */
	for (__u32 round = 0; round <= ring->last_round; round++)
		while (ring->by_round[round] != NONE) {
			__u32 number = ring->by_round[round], turns = 0, due = 0, next;

			ring->by_round[round] = NONE;
			for (; number != NONE; number = next, due++) {
				struct class *class = &ring->classes[number];
				__u32 taking = class->turns ? class->size : class->extra;

				memcpy(ring->turn + turns, ring->ranks + class->first, taking * sizeof(__u32));
				turns += taking;
				if (class->turns)
					class->turns--;
				else
					class->extra = 0;
				next = class->next;
				schedule(ring, number);
			}
			if (due > 1)
				sort_turns(ring, turns);
			take_turns(ring, turns);
		}
}

static int by_key(const void *a, const void *b)
{
	const struct entrant *x = a, *y = b;

	if (x->key != y->key)
		return x->key < y->key ? -1 : 1;
	if (x->name != y->name)
		return x->name < y->name ? -1 : 1;
	return x->weight < y->weight ? -1 : x->weight > y->weight;
}

struct weighed {
	__u32 weight;
	__u32 rank;
};

static int heavier(const void *a, const void *b)
{
	const struct weighed *x = a, *y = b;

	if (x->weight != y->weight)
		return x->weight > y->weight ? -1 : 1;
	return x->rank < y->rank ? -1 : x->rank > y->rank;
}

static int greater_remainder(const void *a, const void *b)
{
	const struct class *const *x = a, *const *y = b;

	if ((*x)->remainder != (*y)->remainder)
		return (*x)->remainder > (*y)->remainder ? -1 : 1;
	return *x < *y ? -1 : *x > *y;	/* heaviest first, as classes are */
}

/* Into classes by weight, each with its number of turns by largest remainder. False: no memory. */
static bool apportion(struct ring *ring)
{
	__u64 slots = 1ULL << ring->bits, total = 0, left = slots;
	struct weighed *weighed = malloc(ring->count * sizeof(*weighed));
	struct class **neediest = malloc(ring->count * sizeof(struct class *));
	bool is_done = weighed && neediest;

	if (!is_done)
		goto out;
	for (__u32 rank = 0; rank < ring->count; rank++) {
		weighed[rank] = (struct weighed){ring->entrants[rank].weight, rank};
		total += weighed[rank].weight;
	}
	qsort(weighed, ring->count, sizeof(*weighed), heavier);
	for (__u32 i = 0; i < ring->count; i++) {
		__u64 share = slots * weighed[i].weight;
		struct class *class = &ring->classes[ring->class_count];

		ring->ranks[i] = weighed[i].rank;
		if (i && weighed[i].weight == weighed[i - 1].weight) {
			class[-1].size++;
		} else {
			*class = (struct class){
				.weight = weighed[i].weight,
				.first = i,
				.size = 1,
				.turns = share / total,
				.remainder = share % total,
			};
			neediest[ring->class_count++] = class;
		}
		left -= share / total;
	}
	qsort(neediest, ring->class_count, sizeof(*neediest), greater_remainder);
	for (__u32 i = 0; left; i++) {
		neediest[i]->extra = left < neediest[i]->size ? left : neediest[i]->size;
		left -= neediest[i]->extra;
	}
	ring->last_round = slots * weighed[0].weight / total + 1;
	for (__u32 i = 0; i < ring->class_count; i++) {
		struct class *class = &ring->classes[i];
		__u64 never = (__u64)ring->last_round << 33;	/* half of it is the last round */

		class->spacing = ((__u64)weighed[0].weight << 32) / class->weight;
		if (class->spacing > never)
			class->spacing = never;
		class->due = class->spacing / 2;
	}
out:
	free(weighed);
	free(neediest);
	return is_done;
}

/* The caller sets bits, table, entrants and count, from 1 to MEMBERS_MAX and to the slots. False: no memory. */
static bool fill_ring(struct ring *ring)
{
	__u32 slots = 1U << ring->bits, mask = slots - 1, count = ring->count;
	bool is_done = false;

	qsort(ring->entrants, count, sizeof(*ring->entrants), by_key);
	/* Listing pays from about here on: a probe costs as much as 16 listed slots, of which AVX2 does 8 at once. */
	ring->tail = 4U << ring->bits / 2;
	if (ring->tail > slots / 2)
		ring->tail = slots / 2;
	ring->left = slots;
	ring->taken = calloc(slots / 64 + 1, sizeof(__u64));
	ring->owner = malloc(slots * sizeof(__u16));
	ring->free = malloc(ring->tail * sizeof(__u32));
	ring->members = malloc(count * sizeof(__u64));
	ring->numbers = malloc(count * sizeof(__u32));
	ring->ranks = malloc(count * sizeof(__u32));
	ring->classes = malloc(count * sizeof(struct class));
	ring->turn = malloc(count * sizeof(__u32));
	ring->due_ranks = calloc(count / 64 + 1, sizeof(__u64));
	if (!ring->taken || !ring->owner || !ring->free || !ring->members || !ring->numbers || !ring->ranks ||
	    !ring->classes || !ring->turn || !ring->due_ranks || !apportion(ring))
		goto out;
	ring->by_round = malloc((ring->last_round + 1) * sizeof(__u32));
	if (!ring->by_round)
		goto out;
	if (slots < 64)
		ring->taken[0] = ~0ULL << slots;	/* what is no slot is not free */
	memset(ring->by_round, 0xff, (ring->last_round + 1) * sizeof(__u32));
	for (__u32 rank = 0; rank < count; rank++) {
		__u64 key = ring->entrants[rank].key;

		ring->members[rank] = member_at((__u32)key & mask, ((__u32)(key >> 32) | 1) & mask, ring->bits);
		ring->numbers[rank] = ring->entrants[rank].number;
	}
	fill(ring);
	for (__u32 slot = 0; slot < slots; slot++)
		ring->table[slot] = ring->numbers[ring->owner[slot]];
	is_done = true;
out:
	free(ring->taken);
	free(ring->owner);
	free(ring->free);
	free(ring->members);
	free(ring->numbers);
	free(ring->ranks);
	free(ring->classes);
	free(ring->turn);
	free(ring->due_ranks);
	free(ring->by_round);
	return is_done;
}
