/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Traffic for measuring: a source of flows, a sink, and what the cost of a packet is compared with. */
#define BPF_LICENSE Dual BSD/GPL

#include "cursor.h"
#include "eth.h"
#include "ip4.h"

#define FRAME 128
#define PORTS 50000		/* flows from one address; the next ones come from the next address */

struct source {
	__u32 ifindex;		/* where frames are sent to */
	__u32 flows;
	__u8 frame[FRAME];
};

struct headers {
	struct eth eth;
	struct ip4 ip;
	__be16 sport;
	__be16 dport;
} __attribute__((packed));

BPF_ARRAY(source_of, struct source, 1);
BPF_PERCPU_ARRAY(sent, u64, 1);

/* Writes the whole frame each time: the one that comes in is the one that went out before. */
int source(struct xdp_md *ctx)
{
	struct headers *headers = (void *)(long)ctx->data;
	u32 zero = 0;
	struct source *from = source_of.lookup(&zero);
	u64 *count = sent.lookup(&zero);
	u64 n;

	if (!from || !count || (void *)headers + FRAME > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	__builtin_memcpy(headers, from->frame, FRAME);
	n = (*count)++ % (from->flows ? from->flows : 1);
	headers->ip.src = bpf_htonl(bpf_ntohl(headers->ip.src) + (u32)(n / PORTS));
	headers->sport = bpf_htons(1024 + (u16)(n % PORTS));
	return bpf_redirect(from->ifindex, 0);
}

int sink(struct xdp_md *ctx)
{
	return XDP_DROP;
}

/* What measuring itself costs. */
int nothing(struct xdp_md *ctx)
{
	return XDP_DROP;
}

/* The floor for whatever puts a header before a packet. */
int floor_encap(struct xdp_md *ctx)
{
	struct headers *headers;

	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(struct ip4)))
		return XDP_DROP;
	headers = (void *)(long)ctx->data;
	if ((void *)headers + 2 * sizeof(*headers) > (void *)(long)ctx->data_end)
		return XDP_DROP;
	__builtin_memcpy(headers, (void *)headers + sizeof(struct ip4), sizeof(struct eth));
	__builtin_memset(&headers->ip, 0, sizeof(headers->ip));
	headers->ip.version_ihl = 0x45;
	return XDP_TX;
}
