/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * For backends: takes the outer header off IP-in-IP packets (RFC 2003) whose inner destination is one of the
 * addresses it was told, and lets them pass on to the host. Everything else passes untouched.
 */
#define BPF_LICENSE Dual BSD/GPL

#if !defined(PIN_DIR) || !defined(DECAP_ADDRESSES)
#error "PIN_DIR and DECAP_ADDRESSES (entries of the map) must be given by -D"
#endif

#include "abi.h"
#include "cursor.h"
#include "eth.h"
#include "ip4.h"

/* inner destination -> what was taken out for it. The agent writes the keys, packets the counts. */
BPF_TABLE_PINNED("percpu_hash", struct addr, struct counter, addresses, DECAP_ADDRESSES, PIN_DIR "/addresses");

static __always_inline struct counter *match(__be32 address)
{
	__u32 key[4] __attribute__((aligned(8))) = {0, 0, bpf_htonl(0xffff), address};

	return addresses.lookup((struct addr *)key);
}

int decap(struct xdp_md *ctx)
{
	struct cursor cursor = {(void *)(long)ctx->data, (void *)(long)ctx->data_end};
	struct eth *eth = take_eth(&cursor);
	struct ip4 *outer, *inner;
	struct counter *counter;
	struct eth header;
	__u32 outer_bytes, length;

	if (!eth || eth->type != ETH_IP4)
		return XDP_PASS;
	outer = take_ip4(&cursor);
	if (!outer || outer->proto != IP_IPIP || outer->fragment & IP4_FRAGMENT)
		return XDP_PASS;
	outer_bytes = ip4_header_bytes(outer);
	cursor.at = (void *)outer + outer_bytes;
	inner = take_ip4(&cursor);
	if (!inner)
		return XDP_PASS;
	length = bpf_ntohs(inner->length);
	if (length < ip4_header_bytes(inner) || outer_bytes + length > bpf_ntohs(outer->length) ||
	    (void *)inner + length > cursor.end)
		return XDP_PASS;
	counter = match(inner->dst);
	if (!counter)
		return XDP_PASS;

	header = *eth;
	if (bpf_xdp_adjust_head(ctx, outer_bytes))
		return XDP_PASS;
	eth = (void *)(long)ctx->data;
	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return XDP_DROP;
	*eth = header;
	counter->packets += 1;
	counter->bytes += length;
	return XDP_PASS;
}
