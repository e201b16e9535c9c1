"""What a model calls: the decorator, steps and odeint; and the warnings for what stays in fp32."""
