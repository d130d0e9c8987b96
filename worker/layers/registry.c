/* The kinds of mixer, one line each. */
#include "worker/session_impl.h"

static const struct lr_layer_ops *const kinds[] = {
    [LR_MIXER_GATED_DELTA] = &lr_gated_delta_layer,
    [LR_MIXER_ATTENTION] = &lr_attention_layer,
};

const struct lr_layer_ops *lr_layer_ops_of(enum lr_mixer mixer)
{
    return kinds[mixer];
}
