/* SPDX-License-Identifier: Apache-2.0 */
/* Which flow records still count, and which slots they keep from settling: see slots.py, judge(). */
#pragma once
#include "_words.h"

#define IP_UDP 17

struct judged_vip {
	const char *slots;	/* NULL: no such VIP */
	__u64 *exceptions;	/* bit per slot */
	__u64 settle_ns;
	unsigned int bits;
	bool has_exceptions;
};

struct judged_real {
	__u32 vip;
	__u32 live;		/* records */
	__u16 generation;
	bool serves;
};

struct court {
	struct judged_vip *vips;
	size_t vip_count;
	struct judged_real *reals;
	size_t real_count;
	__u64 now_ns;
	__u64 ending_ns;
	__u64 udp_idle_ns;
};

/* Whether a record still counts. What it says of its slot is noted on the way. */
static inline bool is_live(struct court *court, const struct flow *flow, __u8 proto)
{
	struct judged_vip *vip;
	struct judged_real *real;
	__u64 idle_ns, limit_ns, slot;
	__u32 number;

	if (flow->vip >= court->vip_count || flow->real >= court->real_count)
		return false;
	vip = &court->vips[flow->vip];
	real = &court->reals[flow->real];
	if (!vip->slots || !real->serves || real->vip != flow->vip || real->generation != flow->generation)
		return false;
	idle_ns = court->now_ns > flow->seen_ns ? court->now_ns - flow->seen_ns : 0;
	limit_ns = proto == IP_UDP ? court->udp_idle_ns : vip->settle_ns;
	if (flow->flags & FLOW_ENDING && court->ending_ns < limit_ns)
		limit_ns = court->ending_ns;
	if (idle_ns > limit_ns)
		return false;
	if (proto != IP_UDP) {
		number = flow->hash >> (32 - vip->bits);
		slot = get64(vip->slots, number);
		if (!(slot & TRACKED))
			return false;
		if (owner_of(slot) != flow->real) {
			set_bit(vip->exceptions, number);
			vip->has_exceptions = true;
		}
	}
	real->live++;
	return true;
}

static size_t judge_all(struct court *court, const char *keys, const char *values, size_t count, __u32 *forget)
{
	size_t forgotten = 0;

	for (size_t i = 0; i < count; i++) {
		__u8 proto = (__u8)keys[i * sizeof(struct flow_key) + offsetof(struct flow_key, proto)];
		struct flow flow;

		memcpy(&flow, values + i * sizeof(flow), sizeof(flow));
		forget[forgotten] = i;
		forgotten += !is_live(court, &flow, proto);
	}
	return forgotten;
}
