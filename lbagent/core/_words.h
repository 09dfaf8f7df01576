/* SPDX-License-Identifier: Apache-2.0 */
/* Words, bits, and slots as bpf/abi.h lays them out. No pointer is taken to be aligned. */
#pragma once
#include <linux/types.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "slots are written as they lie in the kernel's maps");
_Static_assert(sizeof(struct flow_key) == 40 && sizeof(struct flow) == 24, "abi.h");

#define RING_BITS_MAX (RING_BITS_MIN + (RING_SIZES - 1) * RING_BITS_STEP)
#define REALS (1U << SLOT_REAL_BITS)
#define REAL_MASK (REALS - 1)
#define CHANGED_MASK ((1U << SLOT_CHANGED_BITS) - 1)
#define TRACKED (1ULL << SLOT_TRACKED_SHIFT)

static inline __u32 get32(const void *from, size_t index)
{
	__u32 word;

	memcpy(&word, (const char *)from + index * sizeof(word), sizeof(word));
	return word;
}

static inline __u64 get64(const void *from, size_t index)
{
	__u64 word;

	memcpy(&word, (const char *)from + index * sizeof(word), sizeof(word));
	return word;
}

static inline void put32(void *to, size_t index, __u32 word)
{
	memcpy((char *)to + index * sizeof(word), &word, sizeof(word));
}

static inline void put64(void *to, size_t index, __u64 word)
{
	memcpy((char *)to + index * sizeof(word), &word, sizeof(word));
}

static inline bool get_bit(const __u64 *bits, size_t index)
{
	return bits[index / 64] >> index % 64 & 1;
}

static inline void set_bit(__u64 *bits, size_t index)
{
	bits[index / 64] |= 1ULL << index % 64;
}

static inline __u32 owner_of(__u64 slot)
{
	return slot & REAL_MASK;
}

static inline __u32 head_of(__u64 slot)
{
	return owner_of(slot) | (__u32)(slot >> SLOT_TRACKED_SHIFT) << HEAD_TRACKED_SHIFT;
}

static inline __u32 elder_of(__u64 slot)
{
	return slot >> SLOT_ELDER_SHIFT & REAL_MASK;
}

/* Seconds since it changed. They wrap: an age of 2^23 s, 97 days, counts as none. */
static inline __u32 age_of(__u64 slot, __u64 now_s)
{
	return (now_s - (slot >> SLOT_CHANGED_SHIFT)) & CHANGED_MASK;
}

static inline __u64 quiet(__u32 owner)
{
	return (__u64)owner << SLOT_ELDER_SHIFT | owner;
}

static inline __u64 tracked(__u32 owner, __u32 elder, __u32 now_s)
{
	return TRACKED | (__u64)now_s << SLOT_CHANGED_SHIFT | (__u64)elder << SLOT_ELDER_SHIFT | owner;
}

static inline __u64 successor(__u64 slot, __u32 owner, const __u64 *dead, __u32 now_s)
{
	__u32 old = owner_of(slot);

	if (old == owner)
		return slot;
	if (slot & TRACKED)
		return tracked(owner, elder_of(slot), now_s);
	return old && !get_bit(dead, old) ? tracked(owner, old, now_s) : quiet(owner);
}
