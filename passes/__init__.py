"""The pipeline's passes, one per file, in this order:

check_repetition, lift_floats, spell_indices, lift_numbers, find_loops, lift_rows, match_iterations, capture_step,
replay_random, find_states, roll_loop, hoist_invariants, widen_parameters, partition_velocity, lower_velocity,
count_underflow, generate_adjoint, widen_gradients, scale_adjoint, watch_adjoint, keep_activations, store_states,
compensate_sums, emit_loop or emit_search. rampde_fx.backend calls them; no pass imports another.
"""
