from apportion.native.machine_code import keep_machine_code

keep_machine_code()
